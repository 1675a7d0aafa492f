"""Results of each run (metrics, predictions, sparsity, logs) and the table of all runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import read_jsonl, require_file
from sparsity.inspection import MatrixReport, inspect_path, unmasked, zero_totals
from sparsity.metrics import PERPLEXITIES, ROUGE_TYPES, read_metrics
from sparsity.modelopt_state import sparsity_name
from sparsity.pattern import DENSE, Pattern


@dataclass
class Run:
    """One model's results; what its folder lacks stays None or empty.

    Attributes:
        perplexities: results by the name of the text; "" for a text without a name.
        matrices: those of the linear layers, as saved; embeddings and output heads do not count.
        unmasked: elements of the state's other matrices, which stayed dense.
    """

    name: str
    folder: Path
    perplexities: dict[str, dict[str, Any]] = field(default_factory=dict)
    rouge: dict[str, Any] | None = None
    predictions: dict[int, dict[str, Any]] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    unmasked: int = 0
    state: Path | None = None

    def sparsity(self) -> float:
        """Share of zeros in all of these matrices."""
        weights, zeros = zero_totals(self.matrices)
        return zeros / (weights + self.unmasked)


def read_lines(path: str | Path, what: str, keys: set[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file that have all of `keys`.

    Raises:
        UserError: there are none, or the file is not JSONL; the message calls it `what`.
    """
    lines = read_jsonl(require_file(path, what), what)
    rows = [line for line in lines if isinstance(line, dict) and keys <= line.keys()]
    if not rows:
        raise UserError(f"{what} {path} has no line with the fields {', '.join(sorted(keys))}")
    return rows


def read_run(name: str, folder: Path) -> Run:
    """Load what a run's folder contains.

    Raises:
        UserError: nothing there, or files that are not what their names say.
    """
    run = Run(name, folder)
    if (folder / "perplexity.json").is_file():
        run.perplexities = read_metrics(folder / "perplexity.json").get(PERPLEXITIES, {})
    if (folder / "rouge.json").is_file():
        run.rouge = read_metrics(folder / "rouge.json")
    if (folder / "predictions.jsonl").is_file():
        lines = read_lines(folder / "predictions.jsonl", "predictions", {"index", "prediction", "reference"})
        run.predictions = {line["index"]: line for line in lines}
    if not run.perplexities and run.rouge is None and not run.predictions:
        raise UserError(f"run folder {folder} has none of perplexity.json, rouge.json and predictions.jsonl")
    return run


def text_names(runs: list[Run]) -> list[str]:
    """The names of all texts whose perplexity some run has, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for name in run.perplexities))


def measure(runs: list[Run], states: dict[str, Path], model_dir: str | None) -> None:
    """Inspect every run's matrices; a run without a state is the dense model, which is inspected if it is a folder.

    So is one whose state has no masks: the dense model, trained.
    """
    for run in runs:
        run.state = states.get(run.name)
        if run.state and sparsity_name(run.state) != DENSE:
            run.matrices = list(inspect_path(run.state))
            run.unmasked = sum(unmasked(run.state).values())
    pattern = next((Pattern.parse(run.matrices[0].pattern) for run in runs if run.matrices), None)
    dense = list(inspect_path(model_dir, pattern=pattern)) if model_dir and Path(model_dir).is_dir() else []
    for run in runs:
        run.matrices = run.matrices or dense


def table_rows(runs: list[Run]) -> list[list[str]]:
    """Header and one row a run, as text: perplexity of each text, ROUGE in percent, sparsity of the linear layers."""
    texts = text_names(runs) or [""]
    perplexities = [f"perplexity, {text}" if text else "perplexity" for text in texts]
    rows = [["model", *perplexities, "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "sparsity"]]
    patterns = dict.fromkeys(run.matrices[0].pattern for run in runs if run.matrices)
    rows[0].append(f"{', '.join(patterns) or 'sparse'} matrices")
    for run in runs:
        rouge = [f"{run.rouge[key]:.2f}" for key in ROUGE_TYPES] if run.rouge else ["-"] * 4
        valid = sum(matrix.fits for matrix in run.matrices)
        rows.append(
            [
                run.name,
                *(f"{run.perplexities[text]['perplexity']:.2f}" if text in run.perplexities else "-" for text in texts),
                *rouge,
                f"{run.sparsity():.2%}" if run.matrices else "-",
                f"{valid} of {len(run.matrices)}" if run.matrices else "-",
            ]
        )
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The rows as a Markdown table that also reads well on a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
