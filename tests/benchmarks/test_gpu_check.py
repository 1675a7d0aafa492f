"""The check of a GPU machine, without one: its rehearsal, its table, and what it says when something fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_clear_error, run_inline


def gpu_check(*arguments, cwd=ROOT, python=sys.executable):
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/check.sh", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_no_gpu_is_reported_in_one_line(tmp_path):
    result = gpu_check("--work_dir", tmp_path / "work")
    assert_clear_error(result, "no CUDA GPU", "--rehearse")
    assert result.returncode == 1 and result.stdout == "" and not (tmp_path / "work").exists()


@pytest.mark.slow
def test_rehearsal_of_pruning_ends_with_the_table(tmp_path):
    # --output belongs to the folder the user stands in, not to the project's
    result = gpu_check("--rehearse", "--parts", "pts", "--work_dir", "work", "--output", "t.json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "REHEARSAL on the CPU" in result.stdout and "NO" not in result.stdout
    rows = {row["figure"]: row["value"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert all(rows[f"{arm}: peak memory"] > 0 for arm in ("modelopt", "balanced", "fast"))
    assert rows["fast: time / modelopt's"] > 0


def test_a_failing_part_is_named_and_the_others_still_run(tmp_path):
    python = tmp_path / "python"
    python.write_text("""#!/bin/bash
case "$*" in
  -c*) echo 1 ;;
  *--arm\\ fast*) echo "error: the card is on fire" >&2; exit 1 ;;
  *--arm*) ;;
  -m\\ benchmarks.gpu.table*) echo "the table" ;;
  *) exit 137 ;;
esac
""")
    python.chmod(0o755)
    result = gpu_check("--work_dir", tmp_path / "work", python=python)
    assert_clear_error(result, "failed: pts_fast sat eval sparse; the logs are in")
    assert "error: the card is on fire" in (tmp_path / "work" / "pts_fast.log").read_text()
    assert result.stdout.endswith("the table\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "unknown argument '--fast'"),
        (["--parts", "pts,rouge"], "got 'pts,rouge'"),
        (["--layers", "0"], "got '0'"),
        (["--output"], "--output needs a value"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    result = gpu_check(*arguments)
    assert_clear_error(result, words)
    assert result.returncode == 2


def table_of(folder, files: dict[str, dict]):
    """The table's text and figures for the files that steps left."""
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    result = run_inline("benchmarks.gpu.table", folder, "--output", folder / "t.json")
    assert result.returncode == 0, result.stderr
    return result.stdout, {row["figure"]: row["value"] for row in json.loads((folder / "t.json").read_text())["rows"]}


def test_figures_are_held_against_the_targets(tmp_path):
    files = {
        "pts_modelopt.json": {"layers": 4, "seconds": 40.0, "peak_bytes": 8 * 2**30},
        "pts_balanced.json": {"layers": 4, "seconds": 30.0, "peak_bytes": round(3.9e9)},
        "pts_fast.json": {"layers": 4, "seconds": 20.0, "peak_bytes": round(4.1e9)},
    }
    text, rows = table_of(tmp_path, files)
    assert rows["balanced: time scaled to 32 layers"] == 240
    met = {line.partition("  ")[0]: line.split()[-1] for line in text.splitlines() if "<=" in line}
    assert met == {
        "balanced: peak memory": "yes",
        "balanced: time / modelopt's": "NO",
        "fast: peak memory": "NO",
        "fast: time / modelopt's": "yes",
    }


def test_training_evaluation_and_products(tmp_path):
    log = [{"step": step, "loss": 4.0 - step / 10, "tokens_per_second": speed} for step, speed in ((5, 1), (10, 90))]
    products = [
        {"tokens": 1, "dense_ms": 1.0, "cutlass_ms": 4.0, "cutlass_error": 0.0},
        {"tokens": 512, "dense_ms": 3.0, "cutlass_ms": 4.0, "cusparselt_ms": 2.0},
        {"tokens": 512, "dense_ms": 1.0},
    ]
    phases = [{"batch": 1, "prefill_ms": 3.0, "decode_ms": 1.0}], [{"batch": 1, "prefill_ms": 2.0, "decode_ms": 2.0}]
    files = {
        "sat/finetuned/train_log.jsonl": "".join(json.dumps(line) + "\n" for line in [*log, {"eval_loss": 3}]),
        "sat.log": "verified x.pth: 100% of 1,024 pruned weights are 0\nwrote x.pth\n",
        "eval.json": {"examples": 32, "examples_per_second": 4.25, "rougeL": 20.0},
        "sparse.json": {"products": products, "models": [{"dense": phases[0], "sparse": phases[1]}]},
    }
    assert table_of(tmp_path, files)[1] == {
        "training": 90,
        "loss at step 5": 3.5,
        "loss at step 10": 3.0,
        "masks": "100% of 1,024 pruned weights are 0",
        "evaluation": 4.25,
        "rougeL of 32 examples": 20.0,
        "2:4 speedup, 1 tokens, mean": 0.25,
        "2:4 speedup, 512 tokens, mean": 1.5,
        "2:4 speedup, best product": 1.5,
        "2:4 speedup of a one-layer model, prefill": 1.5,
        "2:4 speedup of a one-layer model, decode": 0.5,
    }
