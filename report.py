"""Compare the dense, pruned and fine-tuned model: a table on the terminal, one HTML page and its plots as PNG files.

    python report.py --run dense=DIR/eval/dense --run PTS=DIR/eval/pts --run SAT=DIR/eval/sat \\
        --state PTS=DIR/pts_modelopt_state.pth --state SAT=DIR/finetuned/finetuned_modelopt_state.pth \\
        --model_dir MODEL --pts_layers DIR/pts_layers.jsonl --train_log DIR/finetuned/train_log.jsonl \\
        --output_dir DIR/report

A run is a folder with any of ppl.json (eval_ppl.py --output_json), rouge.json (eval.py --output_json) and
predictions.jsonl (eval.py --predictions). What is not given is left out of the report. The page holds its images, so
report.html alone can be sent to someone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report_page
from rouge import ROUGE_TYPES
from sparsity_check import inspect_path, zero_totals
from utils import UserError, prepare_output_dir, read_json, run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for report.html and the PNG files")
    what = parser.add_argument_group("what to compare")
    pair: dict[str, Any] = {"action": "append", "default": []}
    what.add_argument("--run", metavar="NAME=FOLDER", **pair, help="results of one model; repeat, in the order to show")
    what.add_argument(
        "--state", metavar="NAME=FILE", **pair, help="state file of a run, to measure its sparsity; repeat"
    )
    what.add_argument(
        "--model_dir", help="folder of the dense model; its zeros are counted for the runs without a state"
    )
    how = parser.add_argument_group("how they were made")
    how.add_argument("--pts_layers", metavar="FILE", help="pts_layers.jsonl of hf_pts.py: error and sparsity by layer")
    how.add_argument("--train_log", metavar="FILE", help="train_log.jsonl of finetune.py: the loss curve")
    how.add_argument("--samples", type=int, default=4, help="summaries to show side by side (default %(default)s)")
    how.add_argument("--title", default="2:4 sparsity report", help="title of the page")
    return parser.parse_args()


@dataclass
class Run:
    """One model's results; what its folder lacks stays None or empty."""

    name: str
    folder: Path
    perplexity: dict[str, Any] | None = None
    rouge: dict[str, Any] | None = None
    predictions: dict[int, dict[str, Any]] = field(default_factory=dict)
    sparsity: Sparsity | None = None
    state: Path | None = None


@dataclass
class Sparsity:
    """Zeros counted in the linear layers. `valid` of `matrices` have two or more zeros in every group of four."""

    zeros: float
    weights: int
    matrices: int
    valid: int


# ----------------------------------------------------------------------------------------------- reading


def read_fields(path: Path, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object that has numbers under `keys`."""
    value = read_json(path, what)
    for key in keys:
        if not isinstance(value, dict) or not isinstance(value.get(key), int | float):
            raise UserError(f"{what} {path} has no number '{key}'; is it the --output_json of our evaluation scripts?")
    return value


def read_lines(path: str | Path, what: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a JSONL file that have all of `keys`; there must be some."""
    rows = [row for row in read_json(path, what) if isinstance(row, dict) and all(key in row for key in keys)]
    if not rows:
        raise UserError(f"{what} {path} has no line with the fields {', '.join(keys)}")
    return rows


def split_pairs(pairs: list[str], flag: str) -> dict[str, Path]:
    named = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise UserError(f"{flag} takes NAME=PATH, found '{pair}'")
        if name in named:
            raise UserError(f"{flag} names '{name}' twice; every run needs a name of its own")
        named[name] = Path(path)
    return named


def read_run(name: str, folder: Path) -> Run:
    """Load what lies in a run's folder.

    Raises:
        UserError: nothing there, or files that are not what their names say.
    """
    run = Run(name, folder)
    if (folder / "ppl.json").is_file():
        run.perplexity = read_fields(folder / "ppl.json", "perplexity result", ("perplexity",))
    if (folder / "rouge.json").is_file():
        run.rouge = read_fields(folder / "rouge.json", "ROUGE result", ROUGE_TYPES)
    if (folder / "predictions.jsonl").is_file():
        keys = ("index", "prediction", "reference")
        lines = read_lines(folder / "predictions.jsonl", "predictions", keys)
        run.predictions = {line["index"]: line for line in lines}
    if run.perplexity is None and run.rouge is None and not run.predictions:
        raise UserError(f"run folder {folder} has none of ppl.json, rouge.json and predictions.jsonl")
    return run


# ---------------------------------------------------------------------------------------------- sparsity


def count_zeros(path: Path) -> Sparsity:
    """Add up what the matrices of a state or of a safetensors folder hold; embeddings and output heads do not count."""
    matrices = list(inspect_path(path))
    weights, zeros = zero_totals(matrices)
    return Sparsity(zeros, weights, len(matrices), sum(matrix.is_2_4 for matrix in matrices))


def measure(runs: list[Run], states: dict[str, Path], model_dir: str | None) -> None:
    """Fill in every run's sparsity; a run without a state is the dense model, which is measured if it is a folder."""
    dense = count_zeros(Path(model_dir)) if model_dir and Path(model_dir).is_dir() else None
    for run in runs:
        run.state = states.get(run.name)
        run.sparsity = count_zeros(run.state) if run.state else dense


# ------------------------------------------------------------------------------------------------- table


def table_rows(runs: list[Run]) -> list[list[str]]:
    """Header and one row a run, as text: perplexity, ROUGE in percent, sparsity measured in the linear layers."""
    rows = [["model", "perplexity", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "sparsity", "2:4 matrices"]]
    for run in runs:
        rouge = [f"{100 * run.rouge[key]:.2f}" for key in ROUGE_TYPES] if run.rouge else ["-"] * 4
        found = run.sparsity
        rows.append(
            [
                run.name,
                f"{run.perplexity['perplexity']:.2f}" if run.perplexity else "-",
                *rouge,
                f"{100 * found.zeros / found.weights:.2f}%" if found else "-",
                f"{found.valid} of {found.matrices}" if found else "-",
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


def main() -> None:
    arguments = parse_arguments()
    folders, states = split_pairs(arguments.run, "--run"), split_pairs(arguments.state, "--state")
    if not folders:
        raise UserError("nothing to report: give at least one --run NAME=FOLDER")
    if stray := states.keys() - folders.keys():
        raise UserError(f"--state names '{min(stray)}', which is no --run; runs: {', '.join(folders)}")
    output = prepare_output_dir(arguments.output_dir)
    runs = [read_run(name, folder) for name, folder in folders.items()]
    layers = curve = None
    if arguments.pts_layers:
        layers = read_lines(arguments.pts_layers, "layer log", ("name", "relative_error", "sparsity"))
    if arguments.train_log:
        curve = read_lines(arguments.train_log, "training log", ("step",))
    measure(runs, states, arguments.model_dir)
    rows = table_rows(runs)
    print(markdown(rows))
    page = report_page.write_report(output, arguments.title, rows, runs, layers, curve, arguments.samples)
    print(f"report: {page}")


if __name__ == "__main__":
    run_cli(main)
