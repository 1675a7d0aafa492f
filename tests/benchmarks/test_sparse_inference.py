"""The sparse inference benchmark: quiet without a GPU, and its arithmetic on the CPU with stand-in kernels."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import run_script

from benchmarks import sparse_inference
from sparsity.errors import UserError


def test_explains_itself_without_a_gpu(tmp_path):
    result = run_script("-m", "benchmarks.sparse_inference", "--output", tmp_path / "out.json")
    assert result.returncode == 0
    assert "no CUDA GPU" in result.stdout and result.stderr == ""
    assert not (tmp_path / "out.json").exists()


def test_all_phases_run_and_a_wrong_kernel_is_caught(model_dir, tmp_path, monkeypatch, capsys):
    def refuses(weight):
        if weight.shape[0] < 32:
            raise RuntimeError("shape is not supported")
        return weight.clone()

    monkeypatch.setattr(sparse_inference, "why_not", lambda device: None)
    monkeypatch.setattr(sparse_inference, "backends", lambda: {"stand-in": refuses})
    output = tmp_path / "out.json"
    command = ["sparse_inference.py", "--model_dir", str(model_dir), "--device", "cpu", "--dtype", "bf16"]
    command += ["--tokens", "1", "4", "--batch_sizes", "2", "--prompt", "8", "--new_tokens", "2", "--seconds", "0.001"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    sparse_inference.main()
    printed = capsys.readouterr().out
    assert "stand-in does not take 16x32 here: shape is not supported" in printed
    figures = json.loads(output.read_text())
    assert len(figures["products"]) == 4 * 2  # four shapes of linear layers, two numbers of tokens
    (model,) = figures["models"]
    assert model["layers"] == 10 and model["logits_error"] == 0.0  # the k and v projections have 16 rows
    monkeypatch.setattr(sparse_inference, "backends", lambda: {"wrong": lambda weight: 1.1 * weight})
    with pytest.raises(UserError, match="wrong is wrong"):
        sparse_inference.main()
