"""The table of check.sh, made from the files that its steps left in its folder.

    python -m benchmarks.gpu.table FOLDER [--rehearse] [--output FILE]

FOLDER/parts.tsv lists the steps that ran: part, step, exit code, seconds, and the reason where one failed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.machine import check_output, describe_machine
from sparsity.files import read_json, require_file, save_json
from sparsity.metrics import read_metrics
from utils import Parser, run_cli

GIB = 2**30
MODEL_LAYERS = 32  # of Llama-2-7B
MEMORY_TARGET = 4e9 / GIB  # GiB: at most 4 GB, which is less than 4 GiB
TIME_TARGET = 0.5  # at most this share of modelopt's time


@dataclass
class Row:
    """One line of the table: a figure with its unit, or instead of a number the reason why there is none."""

    part: str
    figure: str
    value: float | str
    unit: str = ""
    target: float | None = None  # the value should be at most this

    def met(self) -> bool | None:
        """Whether the target is met; None without one or without a number."""
        return None if self.target is None or isinstance(self.value, str) else self.value <= self.target


def pts_rows(folder: Path, arm: str) -> list[Row]:
    """Memory and time of one arm and, if modelopt's has run as well, their ratios to modelopt's."""
    found = read_json(folder / f"pts_{arm}.json", "figures")
    layers = found["layers"]
    if "out_of_memory" in found:
        return [Row("pts", f"{arm}, {layers} layers", f"out of memory: {found['out_of_memory']}")]
    ours = arm != "modelopt"
    peak, seconds = found["peak_bytes"] / GIB, found["seconds"]
    rows = [Row("pts", f"{arm}: peak memory" if ours else f"{arm}: peak memory of {layers} layers", peak, "GiB")]
    rows[0].target = MEMORY_TARGET if ours else None
    rows.append(Row("pts", f"{arm}: time of {layers} layers", seconds, "s"))
    if layers != MODEL_LAYERS:
        rows.append(Row("pts", f"{arm}: time scaled to {MODEL_LAYERS} layers", seconds * MODEL_LAYERS / layers, "s"))
    other = folder / "pts_modelopt.json"
    base = read_json(other, "figures") if ours and other.is_file() else {}
    if "seconds" in base:
        memory = found["peak_bytes"] / base["peak_bytes"]
        rows.append(Row("pts", f"{arm}: memory / modelopt's of {layers} layers", memory, "x"))
        rows.append(Row("pts", f"{arm}: time / modelopt's", seconds / base["seconds"], "x", TIME_TARGET))
    return rows


def sat_rows(folder: Path, step: str) -> list[Row]:
    """Speed (median of the log lines after the first, which warms up), losses, and what finetune.py verified."""
    log = read_json(folder / "sat/finetuned/train_log.jsonl", "training log")
    lines = [line for line in log if "loss" in line]
    rates = [line["tokens_per_second"] for line in lines[1:] or lines]
    verified = [line for line in (folder / "sat.log").read_text(errors="replace").splitlines() if "verified" in line]
    zeros = verified[-1].partition(": ")[2] if verified else "NOT VERIFIED"
    return [
        Row("sat", "tokens per second", statistics.median(rates)),
        Row("sat", "optimizer steps", lines[-1]["step"]),
        Row("sat", "first loss", lines[0]["loss"]),
        Row("sat", "last loss", lines[-1]["loss"]),
        Row("sat", "masks", zeros),
    ]


def eval_rows(folder: Path, step: str) -> list[Row]:
    """Speed over all processes, and ROUGE-L in percent."""
    found = read_metrics(folder / "rouge.json")
    return [
        Row("eval", "examples per second", found["examples_per_second"]),
        Row("eval", f"rougeL of {found['examples']} examples", found["rougeL"], "%"),
    ]


def sparse_rows(folder: Path, step: str) -> list[Row]:
    """Dense time / time of the faster sparse kernel: the best product, the means, and the best whole-model phase."""
    if not (folder / "sparse.json").is_file():
        return [Row("sparse", "2:4 products", "not measured: 2:4 kernels need a CUDA GPU")]
    found = read_json(folder / "sparse.json", "figures")
    gains: dict[tuple[int, int, int], float] = {}
    for row in found["products"]:
        times = [value for key, value in row.items() if key.endswith("_ms") and key != "dense_ms"]
        if times:
            gains[row["rows"], row["columns"], row["tokens"]] = row["dense_ms"] / min(times)
    if not gains:
        return [Row("sparse", "2:4 products", "no sparse kernel took any of the shapes")]
    best = max(gains, key=gains.__getitem__)
    rows = [Row("sparse", f"best speedup, {best[0]}x{best[1]}, {best[2]} tokens", gains[best], "x")]
    rows.append(Row("sparse", "mean speedup of all products", statistics.mean(gains.values()), "x"))
    for tokens in sorted({key[2] for key in gains}):
        mean = statistics.mean(gain for key, gain in gains.items() if key[2] == tokens)
        rows.append(Row("sparse", f"mean speedup, {tokens} tokens", mean, "x"))
    for phase in ("prefill_ms", "decode_ms"):
        pairs = [pair for model in found["models"] for pair in zip(model["dense"], model["sparse"], strict=True)]
        if pairs:
            gain = max(dense[phase] / sparse[phase] for dense, sparse in pairs)
            rows.append(Row("sparse", f"best speedup of one-layer model, {phase[:-3]}", gain, "x"))
    return rows


READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    "pts": pts_rows,
    "sat": sat_rows,
    "eval": eval_rows,
    "sparse": sparse_rows,
}


def format_value(value: float | str, unit: str) -> str:
    """A number with two decimals (none from 1,000 on) and its unit; text as it is."""
    if isinstance(value, str):
        return value
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return f"{number} {unit}".strip()


def table(rows: list[Row], rehearsal: bool) -> str:
    """The table as aligned text. The figures of a rehearsal are not compared with the targets."""
    cells = [("part", "figure", "value", "target", "met")]
    for row in rows:
        met = "" if rehearsal else {True: "yes", False: "NO", None: ""}[row.met()]
        target = f"<= {format_value(float(row.target), row.unit)}" if row.target is not None else ""
        cells.append((row.part, row.figure, format_value(row.value, row.unit), target, met))
    # A reason, which may be long, is in the column of the values but does not set its width.
    widths = [max(len(line[i]) for line in cells if i != 2 or len(line[2]) <= 24) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def read_steps(folder: Path) -> list[tuple[str, str, str, str, str]]:
    """The lines of FOLDER/parts.tsv: part, step, exit code, seconds, reason.

    Raises:
        UserError: no such file.
    """
    lines = require_file(folder / "parts.tsv", "list of steps").read_text().splitlines()
    return [(part, step, code, seconds, reason) for part, step, code, seconds, reason in (x.split("\t") for x in lines)]


def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.gpu.table")
    parser.add_argument("folder", type=Path, help="work folder of check.sh")
    parser.add_argument("--rehearse", action="store_true", help="say that these are figures of toy sizes on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the table")
    args = parser.parse_args()
    check_output(args.output)
    steps = read_steps(args.folder)
    rows: list[Row] = []
    for part, step, code, _, reason in steps:
        if code == "0":
            rows += READERS[part](args.folder, step.partition("_")[2])
        else:
            rows.append(Row(part, step, f"failed: {reason}"))
    gpus = 0 if args.rehearse else torch.cuda.device_count()
    machine = describe_machine(torch.device("cuda" if gpus else "cpu"))
    if args.rehearse:
        print("\nREHEARSAL on the CPU at toy sizes: it shows that the parts run; the figures say nothing about a GPU")
    print(f"\n{machine}; {gpus} GPU{'' if gpus == 1 else 's'}\n{table(rows, args.rehearse)}")
    print("seconds: " + ", ".join(f"{step} {seconds}" for _, step, _, seconds, _ in steps))
    if args.output:
        figures = [asdict(row) | {"met": None if args.rehearse else row.met()} for row in rows]
        failed = {step: reason for _, step, code, _, reason in steps if code != "0"}
        times = {step: int(seconds) for _, step, _, seconds, _ in steps}
        facts = {"machine": machine, "gpus": gpus, "rehearsal": args.rehearse, "failed": failed, "seconds": times}
        save_json({**facts, "rows": figures}, args.output)
        print(f"table saved in {args.output}")


if __name__ == "__main__":
    run_cli(main)
