"""benchmarks/gpu_check.sh where there is no GPU: what it says, and that a rehearsal fills its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_clear_error


def gpu_check(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/gpu_check.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "no CUDA GPU"), (["--parts", "pts rest"], "'rest'"), (["--what"], "'--what'")]
)
def test_mistakes_get_one_clear_line(arguments, words):
    assert_clear_error(gpu_check(*arguments), words)


def test_rehearsal_prunes_with_every_arm_and_says_that_it_is_one(tmp_path):
    result = gpu_check("--rehearse", "--parts", "pts", "--output", tmp_path / "table.json")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row[:2] for row in table["rows"]] == [["PTS", arm] for arm in ("modelopt", "balanced", "fast")]
    assert all("of modelopt's time" in row[2] for row in table["rows"][1:])
    assert "REHEARSAL" in result.stdout and "REHEARSAL" in table["note"]
