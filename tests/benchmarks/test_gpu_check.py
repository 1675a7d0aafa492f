"""The check of a GPU machine, without one: its rehearsal, its table, and what it says when something fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_clear_error, run_inline

PTS_FIGURES = [
    "modelopt: peak memory of 2 layers",
    "modelopt: time of 2 layers",
    "modelopt: time scaled to 32 layers",
    *(
        f"{quality}: {figure}"
        for quality in ("balanced", "fast")
        for figure in (
            "peak memory",
            "time of 2 layers",
            "time scaled to 32 layers",
            "memory / modelopt's of 2 layers",
            "time / modelopt's",
        )
    ),
]


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


def test_rehearsal_of_pruning_and_products_ends_with_the_table(tmp_path):
    # --output belongs to the folder the user stands in, not to the project's
    result = gpu_check("--rehearse", "--parts", "sparse,pts", "--work_dir", "work", "--output", "t.json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    head, _, table = result.stdout.partition("\npart ")
    assert "REHEARSAL on the CPU" in head and "0 GPUs" in head
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["rehearsal"] and not found["failed"]
    assert [row["figure"] for row in found["rows"]] == [*PTS_FIGURES, "2:4 products"]
    assert all(row["figure"] in table for row in found["rows"])
    assert all(row["value"] > 0 and row["met"] is None for row in found["rows"][:-1])
    assert found["rows"][-1]["value"].startswith("not measured")


def test_a_failing_part_is_named_and_the_others_still_run(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
case "$*" in
  -c*) echo 1 ;;
  -m\\ benchmarks.gpu.table*) exec {sys.executable} "$@" ;;
  *--arm\\ fast*) echo "error: the card is on fire" >&2; exit 1 ;;
  *--arm*) echo "Traceback"; echo "[rank0]: torch.AcceleratorError: a kernel failed"; echo "summary"; exit 1 ;;
  *sparse_inference*) echo "nothing to measure: Old Card has compute capability 7.0"; echo "model runs as dense" ;;
  -m\\ benchmarks.gpu.pruning\\ --save_model*) ;;
  *) echo "killed without a word"; exit 137 ;;
esac
""")
    python.chmod(0o755)
    result = gpu_check("--work_dir", tmp_path / "work", "--output", tmp_path / "t.json", python=python)
    assert result.returncode == 1
    reasons = {
        "pts_modelopt": "[rank0]: torch.AcceleratorError: a kernel failed",
        "pts_balanced": "[rank0]: torch.AcceleratorError: a kernel failed",
        "pts_fast": "the card is on fire",
        "sat": "killed without a word",
        "eval": "killed without a word",
        "sparse": "nothing to measure: Old Card has compute capability 7.0",
    }
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["failed"] == reasons
    for name, reason in reasons.items():
        assert f"failed: {name}: {reason}\n" in result.stdout
    assert [row["value"] for row in found["rows"]] == [f"failed: {reason}" for reason in reasons.values()]
    assert "failed: pts_modelopt,pts_balanced,pts_fast,sat,eval,sparse; logs are in" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "unknown argument '--fast'"),
        (["--parts", "pts,rouge"], "unknown part 'rouge'"),
        (["--layers", "0"], "found '0'"),
        (["--output"], "--output needs a value"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    result = gpu_check(*arguments)
    assert_clear_error(result, words)
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--layers", "0"], ["--layers must be at least 1", "0"]), ([], ["cuda"])],
)
def test_pruning_refuses_what_cannot_be_measured(arguments, words):
    assert_clear_error(run_inline("benchmarks.gpu.pruning", "--tiny", *arguments), *words)


def test_help_explains():
    result = gpu_check("--help")
    assert result.returncode == 0
    assert "bash benchmarks/gpu/check.sh" in result.stdout and "set -" not in result.stdout


def table_of(folder, steps: list[str], files: dict[str, dict]):
    """The table's text and JSON, for steps that succeeded and the files they left."""
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "parts.tsv").write_text("".join(f"{step.partition('_')[0]}\t{step}\t0\t7\t\n" for step in steps))
    result = run_inline("benchmarks.gpu.table", folder, "--output", folder / "t.json")
    assert result.returncode == 0, result.stderr
    rows = {row["figure"]: row for row in json.loads((folder / "t.json").read_text())["rows"]}
    return result.stdout, rows


def arm(layers: int = 4, **figures):
    return {"layers": layers, "calibration": [128, 1024], **figures}


def test_figures_are_held_against_the_targets(tmp_path):
    files = {
        "pts_modelopt.json": arm(seconds=40.0, peak_bytes=8 * 2**30),
        "pts_balanced.json": arm(seconds=30.0, peak_bytes=round(3.9e9)),
        "pts_fast.json": arm(seconds=20.0, peak_bytes=round(4.1e9)),
    }
    text, rows = table_of(tmp_path, ["pts_modelopt", "pts_balanced", "pts_fast"], files)
    assert rows["balanced: time scaled to 32 layers"]["value"] == 240
    assert rows["balanced: time / modelopt's"]["value"] == 0.75
    assert [rows[f"{quality}: time / modelopt's"]["met"] for quality in ("balanced", "fast")] == [False, True]
    assert [rows[f"{quality}: peak memory"]["met"] for quality in ("balanced", "fast")] == [True, False]
    (line,) = [line for line in text.splitlines() if "fast: peak memory" in line]
    assert "<= 3.73 GiB" in line and line.endswith("NO")


def test_modelopt_out_of_memory_is_a_row_and_no_ratio_is_made_up(tmp_path):
    files = {
        "pts_modelopt.json": arm(32, out_of_memory="CUDA out of memory. Tried to allocate 462.00 MiB."),
        "pts_balanced.json": arm(32, seconds=150.0, peak_bytes=5 * 2**30),
    }
    text, rows = table_of(tmp_path, ["pts_modelopt", "pts_balanced"], files)
    assert rows["modelopt, 32 layers"]["value"].startswith("out of memory: CUDA out of memory.")
    assert list(rows) == ["modelopt, 32 layers", "balanced: peak memory", "balanced: time of 32 layers"]


def test_training_evaluation_and_products(tmp_path):
    log = [
        {"step": step, "loss": 4.0 - step / 10, "tokens_per_second": rate}
        for step, rate in ((5, 10), (10, 90), (15, 70))
    ]
    products = [
        {"rows": 64, "columns": 32, "tokens": 1, "dense_ms": 1.0, "cutlass_ms": 4.0, "cutlass_error": 0.0},
        {"rows": 64, "columns": 32, "tokens": 512, "dense_ms": 3.0, "cutlass_ms": 4.0, "cusparselt_ms": 2.0},
        {"rows": 8, "columns": 32, "tokens": 512, "dense_ms": 1.0},
    ]
    phases = [{"batch": 1, "prefill_ms": 3.0, "decode_ms": 1.0}], [{"batch": 1, "prefill_ms": 2.0, "decode_ms": 2.0}]
    files = {
        "sat/finetuned/train_log.jsonl": "".join(
            json.dumps(line) + "\n" for line in [*log, {"step": 15, "eval_loss": 3}]
        ),
        "sat.log": "verified x.pth: 100% of 1,024 pruned weights are 0\nwrote x.pth\n",
        "rouge.json": {"examples": 32, "examples_per_second": 4.25, "rougeL": 0.2},
        "sparse.json": {"products": products, "models": [{"dense": phases[0], "sparse": phases[1]}]},
    }
    _, rows = table_of(tmp_path, ["sat", "eval", "sparse"], files)
    values = {figure: row["value"] for figure, row in rows.items()}
    assert values == {
        "tokens per second": 80,
        "optimizer steps": 15,
        "first loss": 3.5,
        "last loss": 2.5,
        "masks": "100% of 1,024 pruned weights are 0",
        "examples per second": 4.25,
        "rougeL of 32 examples": 20.0,
        "best speedup, 64x32, 512 tokens": 1.5,
        "mean speedup of all products": 0.875,
        "mean speedup, 1 tokens": 0.25,
        "mean speedup, 512 tokens": 1.5,
        "best speedup of one-layer model, prefill": 1.5,
        "best speedup of one-layer model, decode": 0.5,
    }
