"""The files of figures that evaluation writes and that reports and model cards read: their names and their unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import read_json, save_json

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
        UserError: the file is missing or malformed, or says another unit; the message calls it `what`.
    """
    content = read_json(path, what)
    if not isinstance(content, dict):
        return content
    unit = content.get("unit", "fraction")
    if unit not in (PERCENT, "fraction"):
        raise UserError(f"{what} {path} is in the unit {unit!r}; only {PERCENT} is known")
    return content if unit == PERCENT else _in_percent(content)


def _in_percent(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of figures whose ROUGE is in fractions."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(item) for item in value]
        return 100 * value if isinstance(value, int | float) else value

    found = {name: scaled(content[name]) for name in ROUGE_TYPES if name in content}
    if isinstance(content.get(INTERVALS), dict):
        found[INTERVALS] = {name: scaled(pair) for name, pair in content[INTERVALS].items()}
    return {**content, **found, "unit": PERCENT}
