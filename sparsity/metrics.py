"""The files of figures that evaluation writes and that reports and model cards read: their names and their unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import is_number, read_json, save_json

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


INTERVALS = "confidence_intervals_95"  # [low, high] by name, in the unit of the scores


PERCENT = "percent"


PERPLEXITIES = "perplexities"  # of the texts of eval.py --perplexity_data: figures of each by its name


def save_scores(scores: dict[str, Any], path: str | Path) -> None:
    """Write ROUGE in percent, with whatever else `scores` holds; the file says its unit."""
    save_json({**scores, "unit": PERCENT}, path)


def read_figures(path: str | Path, what: str) -> Any:
    """The content of a file of perplexity or ROUGE. Where it is an object, ROUGE is in percent.

    A file that says no unit holds fractions between 0 and 1, as earlier versions wrote them.

    Raises:
        UserError: the file is missing or malformed, says another unit, or has figures that are no numbers; the message
            calls it `what`.
    """
    content = read_json(path, what)
    if not isinstance(content, dict):
        return content
    unit = content.get("unit", "fraction")
    if unit not in (PERCENT, "fraction"):
        raise UserError(f"{what} {path} is in the unit {unit!r}; only {PERCENT} is known")
    for name, right in _checks(content).items():
        if not right:
            lacks = f"'{name}' without numbers" if name in (INTERVALS, PERPLEXITIES) else f"no number '{name}'"
            raise UserError(f"{what} {path} has {lacks}; is it the --output_json of our evaluation scripts?")
    return content if unit == PERCENT else _in_percent(content)


def _checks(content: dict[str, Any]) -> dict[str, bool]:
    """Whether the figures under each name are numbers, as far as there are any."""
    checks = {name: is_number(content.get(name, 0)) for name in ("perplexity", *ROUGE_TYPES)}
    intervals, named = content.get(INTERVALS, {}), content.get(PERPLEXITIES, {})
    checks[INTERVALS] = isinstance(intervals, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in intervals.values()
    )
    checks[PERPLEXITIES] = isinstance(named, dict) and all(
        name.isprintable() and isinstance(item, dict) and is_number(item.get("perplexity"))
        for name, item in named.items()
    )
    return checks


def _in_percent(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of figures whose ROUGE is in fractions."""
    found: dict[str, Any] = {name: 100 * float(content[name]) for name in ROUGE_TYPES if name in content}
    if INTERVALS in content:
        found[INTERVALS] = {name: [100 * float(end) for end in pair] for name, pair in content[INTERVALS].items()}
    return {**content, **found, "unit": PERCENT}
