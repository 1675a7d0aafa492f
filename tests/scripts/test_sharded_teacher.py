"""Distillation on several processes: the teacher, sharded like the student, gives the loss of one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

from sparsity.sat.callbacks import read_log


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--teacher_offload"]], ids=["on the device", "offloaded"])
def test_a_sharded_teacher_gives_the_same_loss(model_dir, state_path, data_dir, tmp_path, more):
    options = ["--model", model_dir, "--restore_path", state_path, "--data_path", data_dir, "--max_length", 400]
    options += ["--distill", "--distill_kl", 0.5, "--max_steps", 3, "--lr", 1e-2, "--mixed_precision", "no"]
    options = [str(word) for word in [*options, "--logging_steps", 1]]
    run_script("finetune.py", *options, "--output_dir", tmp_path / "one", "--train_bs", "2", check=True)
    result = subprocess.run(
        ["bash", "launch_finetune.sh", "--num_processes=2", *options, "--output_dir", tmp_path / "two", *more]
        + ["--train_bs", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    logs = [read_log(tmp_path / name / "train_log.jsonl") for name in ("one", "two")]
    one, two = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert len(one) == 3 and two == pytest.approx(one, rel=2e-3)
