"""The table of gpu_check.sh: what its parts left in a folder, one line per figure."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine  # noqa: E402

import model_io  # noqa: E402
import utils  # noqa: E402
from sat_trainer import read_log  # noqa: E402

Row = tuple[str, str, str]  # part, figure, value


def pts_rows(folder: Path) -> list[Row]:
    """Time and memory of each arm, and ours divided by modelopt's."""
    arms = utils.read_json(folder / "pts.json", "figures")["arms"]
    rows, base = [], arms.get("modelopt", {"failed": "not run"})
    for arm, figures in arms.items():
        if "failed" in figures:
            rows.append(("PTS", arm, figures["failed"]))
            continue
        seconds, scaled = figures["seconds"], figures["seconds_scaled"]
        text = f"{figures['peak_gib']:.2f} GiB, {seconds:.1f} s ({scaled:.0f} s for 32 layers)"
        if arm != "modelopt" and "failed" not in base:
            time, memory = (figures[key] / base[key] for key in ("seconds", "peak_gib"))
            text += f"; {time:.2f} of modelopt's time, {memory:.2f} of its memory"
        rows.append(("PTS", arm, text))
    return rows


def sat_rows(folder: Path) -> list[Row]:
    """Speed after the first log line, in which everything warms up; loss; and what the saved state was checked for."""
    lines = [line for line in read_log(folder / "sat" / "train_log.jsonl") if "loss" in line]
    later = lines[1:] or lines
    rate = len(later) / sum(1 / line["tokens_per_second"] for line in later)
    log = (folder / "sat.log").read_text()
    checked = re.search(r"\d+% of [\d,]+ pruned weights are 0", log)
    sharding = re.search(r"\d+ weights are sharded over \d+ processes", log)
    return [
        ("SAT", "tokens per second", f"{rate:,.0f}"),
        ("SAT", "loss, first and last", f"{lines[0]['loss']:.3f}, {lines[-1]['loss']:.3f}"),
        ("SAT", "sharding", sharding[0] if sharding else "one process, none"),
        ("SAT", "masks in the saved state", checked[0] if checked else "not verified"),
    ]


def eval_rows(folder: Path) -> list[Row]:
    figures = utils.read_json(folder / "rouge.json", "figures")
    return [
        ("eval", "examples per second", f"{figures['examples_per_second']:.2f}"),
        ("eval", "ROUGE-L", f"{100 * figures['rougeL']:.2f} on {figures['examples']} examples"),
    ]


def speed_rows(folder: Path) -> list[Row]:
    """Median over shapes of dense time / best sparse time, by number of tokens."""
    products = utils.read_json(folder / "speed.json", "figures")["products"]
    ratios: dict[int, list[float]] = {}
    for row in products:
        sparse = [value for key, value in row.items() if key.endswith("_ms") and key != "dense_ms"]
        if sparse:
            ratios.setdefault(row["tokens"], []).append(row["dense_ms"] / min(sparse))
    return [("speed", f"2:4 products, {n} tokens", f"{sorted(r)[len(r) // 2]:.2f}x dense") for n, r in ratios.items()]


PARTS = {"pts": pts_rows, "sat": sat_rows, "eval": eval_rows, "speed": speed_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, required=True)
    parser.add_argument("--failed", nargs="*", default=[], help="parts that ended with an error")
    parser.add_argument("--note", default="", help="a line above the table")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the table")
    args = parser.parse_args()
    rows: list[Row] = []
    for part in args.parts:
        rows += [(part, "", "failed")] if part in args.failed else PARTS[part](args.folder)
    machine = describe_machine(model_io.resolve_device("auto"))
    count = torch.cuda.device_count()
    print(f"\n{machine}{f', {count} GPUs' if count > 1 else ''}{args.note and f'. {args.note}'}")
    for part, figure, value in rows:
        print(f"{part:<6} {figure:<26} {value}")
    if args.output:
        utils.save_json({"machine": machine, "gpus": count, "note": args.note, "rows": rows}, args.output)


if __name__ == "__main__":
    utils.run_cli(main)
