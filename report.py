r"""Compare the dense, pruned and fine-tuned model: a table on the terminal, one HTML page and its plots as PNG files.

    python report.py --run dense=DIR/eval/dense --run PTS=DIR/eval/pts --run SAT=DIR/eval/sat \
        --state PTS=DIR/pts_modelopt_state.pth --state SAT=DIR/finetuned/finetuned_modelopt_state.pth \
        --model_dir MODEL --pts_layers DIR/pts_layers.jsonl --train_log DIR/finetuned/train_log.jsonl \
        --output_dir DIR/report

A run is a folder with any of rouge.json (eval.py --output_json), perplexity.json (eval_ppl.py --output_json) and
predictions.jsonl (eval.py --predictions). What a run lacks is left out of the report. The page holds its images, so
report.html alone can be sent to someone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import prepare_output_dir
from utils import Parser, add_model_option, check_at_least, parse_named, run_cli


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder for report.html and the PNG files")
    what = parser.add_argument_group("what to compare")
    pair: dict[str, Any] = {"action": "append", "default": []}
    what.add_argument("--run", metavar="NAME=FOLDER", **pair, help="results of one model; repeat, in the order to show")
    what.add_argument(
        "--state", metavar="NAME=FILE", **pair, help="state file of a run, to measure its sparsity; repeat"
    )
    dense = "folder of the dense model; its zeros are counted for the runs without a state"
    add_model_option(what, dense, required=False)
    how = parser.add_argument_group("how they were made")
    how.add_argument("--pts_layers", metavar="FILE", help="pts_layers.jsonl of hf_pts.py: error and sparsity by layer")
    how.add_argument("--train_log", metavar="FILE", help="train_log.jsonl of finetune.py: the loss curve")
    how.add_argument("--samples", type=int, default=4, help="summaries to show side by side")
    how.add_argument("--title", default="Sparsity report", help="title of the page")
    return parser.parse_args()


def main() -> None:
    args = parse_args()

    # Imported after parsing, so that `--help` needs no torch.
    from sparsity.reporting.page import write_report
    from sparsity.reporting.results import markdown, measure, read_lines, read_run, table_rows

    folders, states = parse_named("--run", args.run), parse_named("--state", args.state)
    check_at_least(args, 0, "samples")
    if not folders:
        raise UserError("nothing to report: give at least one --run NAME=FOLDER")
    if stray := states.keys() - folders.keys():
        raise UserError(f"--state names '{min(stray)}', which is no --run; runs: {', '.join(folders)}")
    output = prepare_output_dir(args.output_dir)
    runs = [read_run(name, Path(folder)) for name, folder in folders.items()]
    layers = curve = None
    if args.pts_layers:
        layers = read_lines(args.pts_layers, "layer log", {"name", "relative_error", "sparsity"})
    if args.train_log:
        curve = read_lines(args.train_log, "training log", {"step"})
    measure(runs, {name: Path(state) for name, state in states.items()}, args.model_dir)
    rows = table_rows(runs)
    print(markdown(rows))
    page = write_report(output, args.title, rows, runs, layers, curve, args.samples)
    print(f"report: {page}")


if __name__ == "__main__":
    run_cli(main)
