"""Pruning with modelopt's own SparseGPT and with ours, in the same way for every benchmark."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoint import LayerStore
from layerwise import QUALITY, prune_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune(arm: str, model: PreTrainedModel, batches: list[torch.Tensor], device: torch.device, folder: Path) -> None:
    """Prune `model` in place on batches of input_ids [batch, length].

    Args:
        arm: "modelopt", for which the model lies on `device`, or a key of QUALITY, for which it lies on the CPU.
        folder: where ours keeps finished layers, as hf_pts.py does.
    """
    if arm != "modelopt":
        inputs = [{"input_ids": batch} for batch in batches]
        prune_model(model, inputs, QUALITY[arm], device, LayerStore(folder / "layers", arm))
        return
    import modelopt.torch.sparsity as mts

    def forward_loop(model: PreTrainedModel) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(device), use_cache=False)

    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # a line for every matrix
        mts.sparsify(model, "sparsegpt", config={"forward_loop": forward_loop, "verbose": False})
