"""The result files that evaluation writes, and that reports and model cards read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import is_number, read_json, save_json

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
INTERVALS = "confidence_intervals_95"  # [low, high] by the name of a score, in percent as the scores are
PERPLEXITIES = "perplexities"  # results by the name of the text; "" is a text without a name


def save_rouge(scores: dict[str, Any], path: str | Path) -> None:
    """Write ROUGE in percent, with whatever else `scores` holds; the file says its unit."""
    save_json({**scores, "unit": "percent"}, path)


def save_perplexities(results: dict[str, dict[str, Any]], facts: dict[str, Any], path: str | Path) -> None:
    """Write the results of texts by name, with the facts of the run; those of a text without a name at the top."""
    save_json({**results.get("", {PERPLEXITIES: results}), **facts}, path)


def read_metrics(path: str | Path) -> dict[str, Any]:
    """The content of a result file of eval.py or eval_ppl.py; perplexities are always under PERPLEXITIES.

    Raises:
        UserError: the file is missing or malformed, or has neither ROUGE nor perplexity.
    """
    content = read_json(path, "result file")
    if isinstance(content, dict) and "perplexity" in content:
        content = {**content, PERPLEXITIES: {"": content}}
    numbers = list(_numbers(content))
    if not numbers or not all(map(is_number, numbers)):
        raise UserError(
            f"result file {path} has no ROUGE or perplexity; give an --output_json of eval.py or eval_ppl.py"
        )
    return content


def _numbers(content: Any) -> Iterator[Any]:
    """Everything that must be a number; None for what is missing or of another type."""
    if not isinstance(content, dict):
        return
    perplexities, intervals = content.get(PERPLEXITIES, {}), content.get(INTERVALS, {})
    for name, result in perplexities.items() if isinstance(perplexities, dict) else [("", None)]:
        yield result.get("perplexity") if isinstance(result, dict) and name.isprintable() else None
    if not content.keys().isdisjoint(ROUGE_TYPES):
        yield from (content.get(name) for name in ROUGE_TYPES)
        for pair in intervals.values() if isinstance(intervals, dict) else [None]:
            yield from pair if isinstance(pair, list) and len(pair) == 2 else [None]
