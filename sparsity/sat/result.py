"""The fine-tuned state: gathered, written, and verified on the file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from sparsity.devices import return_freed_memory
from sparsity.errors import UserError
from sparsity.files import save_torch
from sparsity.sat.low_rank import trained_only
from sparsity.sat.model import Student
from sparsity.sat.sharding import full_state
from sparsity.sat.trainer import SparseTrainer
from sparsity.modelopt_state import load_state, sparse_masks

STATE_NAME = "finetuned_modelopt_state.pth"


def free_training_memory(trainer: SparseTrainer) -> None:
    """Let go of gradients and of what the optimizer keeps, once training has ended: as large as the saved state."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    return_freed_memory()


def save_and_verify(trainer: SparseTrainer, student: Student, path: Path) -> None:
    """Gather the weights, save them with the masks, and check on the saved file that all pruned weights are +0.0."""
    free_training_memory(trainer)
    with contextlib.nullcontext() if student.merge is None else trained_only(trainer.model):
        weights = full_state(trainer.accelerator, trainer.model, student.dtypes)
    if not trainer.args.should_save:
        return
    if student.merge is not None:
        weights = student.merge(weights)
    save_torch({"modelopt_state": student.modelopt_state, "model_state_dict": weights}, path)
    pruned = intact = 0
    for name, weight, mask in sparse_masks(load_state(path)["model_state_dict"]):
        kept_zero = weight[~mask]
        pruned += kept_zero.numel()
        intact += int(((kept_zero == 0) & ~torch.signbit(kept_zero)).sum())
        if not torch.isfinite(weight).all():
            raise UserError(f"'{name}' in {path} is not finite; train again with a lower --lr")
    if pruned == 0 or intact != pruned:
        raise RuntimeError(f"{pruned - intact} of {pruned} pruned weights in {path} are not zero")
    print(f"verified {path}: {100 * intact / pruned:.0f}% of {pruned:,} pruned weights are 0")
