"""The result files that evaluation writes, and that reports and model cards read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import read_json, save_json

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
INTERVALS = "confidence_intervals_95"  # [low, high] by the name of a score, in percent as the scores are
PERPLEXITIES = "perplexities"  # results by the name of the text; "" is a text without a name


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
    numbers: list[Any] = []
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # of another shape
        texts = content.get(PERPLEXITIES, {}).items()
        found = [result["perplexity"] if name.isprintable() else None for name, result in texts]
        if not content.keys().isdisjoint(ROUGE_TYPES):
            found += [content[name] for name in ROUGE_TYPES]
            found += [end for low, high in content.get(INTERVALS, {}).values() for end in (low, high)]
        numbers = found
    if not numbers or not all(isinstance(n, float) or (isinstance(n, int) and abs(n) < 1e300) for n in numbers):
        raise UserError(
            f"result file {path} has no ROUGE or perplexity; give an --output_json of eval.py or eval_ppl.py"
        )
    return content
