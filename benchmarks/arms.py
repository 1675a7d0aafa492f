"""Pruning with modelopt's SparseGPT and with this project, in the same way for every benchmark."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsity.pts.layer_store import LayerStore
from sparsity.pts.prune import prune_model
from sparsity.pts.recipe import QUALITY, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune(
    arm: str,
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    device: torch.device,
    folder: Path,
    token_weights: list[float] | None = None,
) -> None:
    """Prune `model` in place.

    Args:
        arm: "modelopt", with the model on `device`; "magnitude" or a key of `QUALITY`, with the model on the CPU.
        batches: calibration tokens, int64 tensors [batch, length].
        folder: for the finished layers of this project's pruning, which are written to disk as in hf_pts.py.
        token_weights: what the tokens of each batch count, for this project's pruning.
    """
    if arm != "modelopt":
        inputs = [{"input_ids": batch} for batch in batches if arm != "magnitude"]
        store = LayerStore(folder / "layers", arm)
        recipe = QUALITY.get(arm, Recipe("sparse_magnitude"))
        prune_model(model, inputs, recipe, device, store, token_weights=token_weights)
        return
    import modelopt.torch.sparsity as mts

    def forward_loop(model: PreTrainedModel) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(device), use_cache=False)

    # modelopt prints a line for every matrix
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        mts.sparsify(model, "sparsegpt", config={"forward_loop": forward_loop, "verbose": False})
