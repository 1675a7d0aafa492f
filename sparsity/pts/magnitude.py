"""Magnitude pruning of the weights alone: no text, no forward pass, each layer read and written once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from sparsity.devices import peak_memory_mib, return_freed_memory
from sparsity.models import decoder_layers
from sparsity.distributed import hide_bar
from sparsity.pts.structure import choose_linears
from sparsity.pts.log import MatrixLog
from sparsity.pts.masks import magnitude_mask
from sparsity.pts.prune import check_weights
from sparsity.pts.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def prune_by_magnitude(
    model: PreTrainedModel,
    recipe: Recipe,
    device: torch.device,
    ignore: Sequence[str] = (),
    on_rows: Callable[[list[MatrixLog]], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Set the smallest weights of `model` (on the CPU) to zero, in place; the others keep their values.

    The masks are those that `prune_model` chooses by magnitude. Without inputs there is no error to log.

    Args:
        on_rows: called after each decoder layer with all log rows so far.

    Returns:
        mask [out, in] (bool, True is kept) by name of the linear layer.

    Raises:
        UserError: unsupported architecture, or non-finite weights.
    """
    prefix, layers = decoder_layers(model)
    chosen, _ = choose_linears(model, recipe.pattern, list(ignore))
    masks: dict[str, Tensor] = {}
    rows: list[MatrixLog] = []
    for index, layer in enumerate(tqdm(layers, "pruning", unit="layer", disable=hide_bar())):
        started = time.perf_counter()
        linears = {name: module for name, module in layer.named_modules(prefix=f"{prefix}.{index}") if name in chosen}
        check_weights([linears])
        layer_rows = []
        for name, linear in linears.items():
            begun = time.perf_counter()
            weight = linear.weight.to(device)
            mask = magnitude_mask(weight.float(), recipe.pattern)
            # A new tensor: the old one's memory may be mapped from the checkpoint, and pages written to stay in memory.
            linear.weight.data = weight.masked_fill(~mask, 0.0).cpu()
            masks[name] = mask.cpu()
            sparsity, seconds = 1 - float(mask.float().mean()), round(time.perf_counter() - begun, 4)
            layer_rows.append(MatrixLog(name, list(mask.shape), None, sparsity, None, seconds))
        for row in layer_rows:
            row.layer_seconds = round(time.perf_counter() - started, 3)
            row.peak_memory_mib = round(peak_memory_mib(device), 1)
        rows += layer_rows
        on_rows(rows)
        return_freed_memory()
    return masks
