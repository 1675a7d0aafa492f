"""Checkpoints: which count as complete, and what weights and optimizer states they hold."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparsity.errors import UserError
from sparsity.files import SEAL, seal
from sparsity.sat import checkpoints


@pytest.fixture
def root(tmp_path):
    """Four complete checkpoints."""
    for step in (2, 4, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "model.bin").write_bytes(b"x" * step)
        seal(folder)
    (tmp_path / "checkpoint-tmp").mkdir()
    return tmp_path


def steps(root):
    return [checkpoints.step_of(folder) for folder in checkpoints.checkpoint_folders(root)]


def test_the_last_complete_checkpoint_is_chosen_by_number(root, capsys):
    assert steps(root) == [2, 4, 10, 12]
    assert checkpoints.last_complete(root) == root / "checkpoint-12"
    (root / "checkpoint-12" / "part" / "model.bin").write_bytes(b"x" * 11 + b"y")
    (root / "checkpoint-10" / SEAL).unlink()  # never finished
    assert checkpoints.last_complete(root) == root / "checkpoint-4"
    assert capsys.readouterr().err.startswith(f"warning: checkpoint {root / 'checkpoint-12'} is damaged")
    checkpoints.remove_partial(root)
    assert steps(root) == [2, 4, 12]


def test_rotation_keeps_the_newest_and_the_best(root):
    checkpoints.rotate(root / "checkpoint-12", 2, best=str(root / "checkpoint-2"))
    assert steps(root) == [2, 10, 12]
    checkpoints.rotate(root / "checkpoint-10", 1, best=None)  # of a run that was resumed from an earlier checkpoint
    assert steps(root) == [10, 12]


def test_a_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.last_complete(tmp_path / "absent") is None


# ---------------------------------------------------------------------------------------------------------- content


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
def test_training_continues_as_if_it_had_not_stopped(optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 300)
    model, used = trained(optimizer)
    checkpoints.save(tmp_path, model, used)
    files = list((tmp_path / checkpoints.TENSORS).iterdir())
    assert (len(files) > 1 or optimizer == "SGD") and all(path.suffix == ".safetensors" for path in files)
    other, fresh = trained(optimizer, steps=0)
    with torch.no_grad():
        other["inner"].weight.zero_()
        other._weight_mask.zero_()
    checkpoints.load_weights(tmp_path, other)
    checkpoints.load_optimizer(tmp_path, other, fresh)
    assert torch.equal(other._weight_mask, model._weight_mask) and other["head"].weight is other["inner"].weight
    for step in (2, 3):
        train_step(model, used, step)
        train_step(other, fresh, step)
    assert torch.equal(other["inner"].weight, model["inner"].weight)
    assert torch.equal(other["inner"].bias, model["inner"].bias)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    checkpoints.save(tmp_path, *trained("AdamW"))
    with pytest.raises(UserError, match="cannot read .*; other checkpoints are unchanged"):
        checkpoints.load_weights(tmp_path, nn.Linear(3, 3))


def test_values_are_plain_json(tmp_path):
    checkpoints.save(tmp_path, *trained("AdamW"))
    values = json.loads((tmp_path / checkpoints.VALUES).read_text())
    assert values["state"]["inner.weight"]["step"] == 2 and values["param_groups"][0]["lr"] == 0.1
