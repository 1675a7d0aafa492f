"""The table of check.sh, made from the files that its steps left in its folder.

    python -m benchmarks.gpu.table FOLDER [--rehearse] [--output FILE]

A step that failed or was left out has left no file and gets no line.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.machine import check_output, describe_machine
from sparsity.files import read_json, save_json
from utils import Parser, run_cli

GIB = 2**30
MODEL_LAYERS = 32  # of Llama-2-7B
MEMORY_TARGET = 4e9 / GIB  # GiB: at most 4 GB, which is less than 4 GiB
TIME_TARGET = 0.5  # at most this fraction of modelopt's time


@dataclass
class Row:
    """One line of the table; `target` is what the value should be at most."""

    figure: str
    value: float | str
    unit: str = ""
    target: float | None = None

    def cells(self, rehearsal: bool) -> tuple[str, str, str, str]:
        """Figure, value, target, and whether it is met, which means nothing in a rehearsal."""
        value = self.value if isinstance(self.value, str) else f"{self.value:,.2f} {self.unit}"
        if self.target is None or isinstance(self.value, str):
            return self.figure, value, "", ""
        met = "" if rehearsal else "yes" if self.value <= self.target else "NO"
        return self.figure, value, f"<= {self.target:.2f} {self.unit}", met


def pts_rows(folder: Path) -> list[Row]:
    """Memory and time of each arm, and their ratios to modelopt's."""
    rows, base = [], None
    for arm in ("modelopt", "balanced", "fast"):
        if not (path := folder / f"pts_{arm}.json").is_file():
            continue
        figures = read_json(path, "figures")
        layers, peak, seconds = figures["layers"], figures["peak_bytes"] / GIB, figures["seconds"]
        scaled = seconds * MODEL_LAYERS / layers
        rows.append(Row(f"{arm}: peak memory", peak, "GiB", None if arm == "modelopt" else MEMORY_TARGET))
        rows.append(Row(f"{arm}: time of {layers} layers", seconds, "s"))
        rows.append(Row(f"{arm}: time scaled to {MODEL_LAYERS} layers", scaled, "s"))
        if arm == "modelopt":
            base = peak, seconds
        elif base:
            rows.append(Row(f"{arm}: memory / modelopt's of {layers} layers", peak / base[0], "x"))
            rows.append(Row(f"{arm}: time / modelopt's", seconds / base[1], "x", TIME_TARGET))
    return rows


def sat_rows(folder: Path) -> list[Row]:
    """Speed (median of the log lines after the first, which warms up), losses, and what finetune.py verified."""
    log = folder / "sat/finetuned/train_log.jsonl"
    if not log.is_file():
        return []
    lines = [line for line in read_json(log, "training log") if "loss" in line]
    verified = [line for line in (folder / "sat.log").read_text(errors="replace").splitlines() if "verified" in line]
    return [
        Row("training", statistics.median(line["tokens_per_second"] for line in lines[1:] or lines), "tokens/s"),
        Row(f"loss at step {lines[0]['step']}", lines[0]["loss"]),
        Row(f"loss at step {lines[-1]['step']}", lines[-1]["loss"]),
        Row("masks", verified[-1].partition(": ")[2] if verified else "NOT VERIFIED"),
    ]


def eval_rows(folder: Path) -> list[Row]:
    """Speed over all processes, and ROUGE-L."""
    if not (path := folder / "eval.json").is_file():
        return []
    figures = read_json(path, "figures")
    return [
        Row("evaluation", figures["examples_per_second"], "examples/s"),
        Row(f"rougeL of {figures['examples']} examples", figures["rougeL"]),
    ]


def sparse_rows(folder: Path) -> list[Row]:
    """Dense time / time of the faster sparse kernel: of each product, their mean by tokens, and of the whole model."""
    if not (path := folder / "sparse.json").is_file():
        return []
    figures = read_json(path, "figures")
    gains: dict[int, list[float]] = {}
    for row in figures["products"]:
        times = [value for key, value in row.items() if key.endswith("_ms") and key != "dense_ms"]
        if times:
            gains.setdefault(row["tokens"], []).append(row["dense_ms"] / min(times))
    rows = [Row(f"2:4 speedup, {tokens} tokens, mean", statistics.mean(gains[tokens]), "x") for tokens in sorted(gains)]
    if gains:
        rows.append(Row("2:4 speedup, best product", max(map(max, gains.values())), "x"))
    pairs = [pair for model in figures["models"] for pair in zip(model["dense"], model["sparse"], strict=True)]
    for phase in ("prefill", "decode") if pairs else ():
        gain = max(dense[f"{phase}_ms"] / sparse[f"{phase}_ms"] for dense, sparse in pairs)
        rows.append(Row(f"2:4 speedup of a one-layer model, {phase}", gain, "x"))
    return rows


def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.gpu.table")
    parser.add_argument("folder", type=Path, help="work folder of check.sh")
    parser.add_argument("--rehearse", action="store_true", help="say that these are figures of toy sizes on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the table")
    args = parser.parse_args()
    check_output(args.output)
    rows = [row for read in (pts_rows, sat_rows, eval_rows, sparse_rows) for row in read(args.folder)]
    gpus = 0 if args.rehearse else torch.cuda.device_count()
    machine = describe_machine(torch.device("cuda" if gpus else "cpu"))
    if args.rehearse:
        print("\nREHEARSAL on the CPU at toy sizes: it shows that the parts run; the figures say nothing about a GPU")
    print(f"\n{machine}; {gpus} GPU{'' if gpus == 1 else 's'}")
    lines = [("figure", "value", "target", "met"), *(row.cells(args.rehearse) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if args.output:
        facts = {"machine": machine, "gpus": gpus, "rehearsal": args.rehearse}
        save_json({**facts, "rows": [asdict(row) for row in rows]}, args.output)
        print(f"table saved in {args.output}")


if __name__ == "__main__":
    run_cli(main)
