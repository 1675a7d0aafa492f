"""Weights and optimizer states that checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsity.errors import UserError
from sparsity.sat import training_state


def trained(optimizer: str, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": nn.Linear(8, 8), "head": nn.Linear(8, 8, bias=False)})
    model["head"].weight = model["inner"].weight  # tied
    model.register_buffer("_weight_mask", torch.rand(8, 8) > 0.5)
    if optimizer == "adafactor":
        from transformers.optimization import Adafactor

        used = Adafactor(model.parameters(), lr=0.1, scale_parameter=False, relative_step=False)
    else:
        used = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    for step in range(steps):
        train_step(model, used, step)
    return model, used


def train_step(model, optimizer, step: int) -> None:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    model["head"](model["inner"](rows)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "adafactor", "Adagrad"])
def test_training_continues_as_if_it_had_not_stopped(optimizer, tmp_path):
    model, used = trained(optimizer)
    training_state.save(tmp_path, model, used)
    other, fresh = trained(optimizer, steps=0)
    with torch.no_grad():
        other["inner"].weight.zero_()
        other._weight_mask.zero_()
    training_state.load_weights(tmp_path, other)
    training_state.load_optimizer(tmp_path, other, fresh)
    assert torch.equal(other._weight_mask, model._weight_mask) and other["head"].weight is other["inner"].weight
    for step in (2, 3):
        train_step(model, used, step)
        train_step(other, fresh, step)
    assert torch.equal(other["inner"].weight, model["inner"].weight)
    assert torch.equal(other["inner"].bias, model["inner"].bias)


def test_large_states_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(training_state, "FILE_BYTES", 300)
    model, used = trained("AdamW")
    training_state.save(tmp_path, model, used)
    files = list((tmp_path / training_state.TENSORS).iterdir())
    assert len(files) > 1 and all(path.suffix == ".safetensors" for path in files)
    other, fresh = trained("AdamW", steps=0)
    training_state.load_weights(tmp_path, other)
    training_state.load_optimizer(tmp_path, other, fresh)
    assert torch.equal(other["inner"].weight, model["inner"].weight)


def test_damaged_or_foreign_state_is_one_line(tmp_path):
    model, used = trained("AdamW")
    training_state.save(tmp_path, model, used)
    with pytest.raises(UserError, match="cannot read .*; other checkpoints are as they were"):
        training_state.load_weights(tmp_path, nn.Linear(3, 3))
    file: Path = next((tmp_path / training_state.TENSORS).iterdir())
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot read"):
        training_state.load_weights(tmp_path, model)
    (tmp_path / training_state.VALUES).write_text("{")
    with pytest.raises(UserError):
        training_state.load_optimizer(tmp_path, model, used)


def test_values_are_plain_json(tmp_path):
    training_state.save(tmp_path, *trained("AdamW"))
    values = json.loads((tmp_path / training_state.VALUES).read_text())
    assert values["state"]["inner.weight"]["step"] == 2 and values["param_groups"][0]["lr"] == 0.1
