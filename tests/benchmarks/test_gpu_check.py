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
