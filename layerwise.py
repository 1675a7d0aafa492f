"""Prune a language model decoder layer by decoder layer, with one layer at a time on the device.

    calibration batches → embeddings → layer 0 → layer 1 → …, each pruned on the output of the pruned ones

decoder.py finds out what a model looks like inside, calibration.py what its linear layers are given, and sparsegpt.py
is the mathematics of a single weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibration import Statistics, add_output, collect, collect_residual
from checkpoint import LayerStore
from decoder import Delivery, Stream, choose_linears, decoder_layers, shared_inputs
from processes import is_main_process, peak_memory_mib, return_freed_memory
from sparsegpt import (
    Pattern,
    admm,
    damp,
    layer_error,
    least_squares,
    magnitude_mask,
    refit,
    sparsegpt,
    wanda_mask,
)
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the three named choices for SparseGPT."""

    method: str = "sparsegpt"  # or "wanda", "magnitude"
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    admm_iterations: int = 0  # mask search, in place of SparseGPT's column loop
    dense_inputs: bool = False  # Hessians of the dense model's activations: fewer forward passes
    asymmetric: bool = False  # fit the last linear of each layer to the dense model's output, not to its own


# Damping ten times the paper's 0.01 holds the refitted weights nearer to the dense ones: a little is lost on text like
# the calibration set's, more is won on other text (benchmarks/README.md).
QUALITY = {
    "fast": Recipe(percdamp=0.1, refit_iterations=6, dense_inputs=True),
    "balanced": Recipe(percdamp=0.1, refit_iterations=6, dense_inputs=True, asymmetric=True),
    "best": Recipe(percdamp=0.1, refit_iterations=6, admm_iterations=16, dense_inputs=True, asymmetric=True),
}

# Decoder layers have about four groups of linear layers: before attention, after it, before and after the activation.
MOST_STAGES = 8


def check_weights(groups: list[dict[str, nn.Linear]]) -> None:
    """Before calibration passes a NaN on, of which the layers after it would then be accused.

    Raises:
        UserError: a weight is NaN or infinite; names it.
    """
    for group in groups:
        for name, linear in group.items():
            if not torch.isfinite(linear.weight).all():
                raise UserError(f"the weight of {name} holds NaN or infinite values; the checkpoint is damaged")


def prune_group(
    group: dict[str, nn.Linear], statistics: Statistics, recipe: Recipe
) -> tuple[dict[str, Tensor], list[dict]]:
    """Prune the linear layers that share an input as one tall matrix and write the new weights into them.

    The statistics are used up: a second copy would be as large as the first.

    Returns:
        mask [out, in] by name; a log row by linear layer.
    """
    started = time.perf_counter()
    weight, hessian = torch.cat([linear.weight for linear in group.values()]).float(), statistics.hessian
    percdamp, damping = None, weight.new_zeros(())
    if recipe.method == "magnitude":
        mask = magnitude_mask(weight, recipe.pattern)
        pruned = weight * mask
    elif recipe.method == "wanda":
        mask = wanda_mask(weight, hessian, recipe.pattern)
        pruned = weight * mask
    else:
        damping, inverse_factor, percdamp = damp(hessian, recipe.percdamp)
        if percdamp > recipe.percdamp and is_main_process():
            tqdm.write(
                f"warning: {next(iter(group))}: its Hessian needed damping {percdamp:g}, not {recipe.percdamp:g}"
            )
        if statistics.cross is not None:
            weight = least_squares(weight, statistics.cross, damping, inverse_factor)
            statistics.cross = None
        if recipe.admm_iterations:
            del inverse_factor  # as large as the Hessian
            start = weight * wanda_mask(weight, hessian, recipe.pattern)
            pruned, mask = admm(weight, hessian, start, recipe.pattern, recipe.admm_iterations)
        else:
            pruned, mask = sparsegpt(weight, inverse_factor, recipe.pattern, recipe.block_size)
            del inverse_factor
        if recipe.refit_iterations:
            pruned = refit(weight, hessian, pruned, mask, recipe.refit_iterations)
    lost, energy = layer_error(pruned - weight, hessian, damping), layer_error(weight, hessian, damping)
    seconds = time.perf_counter() - started
    sizes = [linear.out_features for linear in group.values()]
    masks, rows = {}, []
    for (name, linear), *parts in zip(
        group.items(), *(t.split(sizes) for t in (pruned, mask, lost, energy)), strict=True
    ):
        new, kept, error, total = parts
        # Adding zero turns a -0.0 left by a multiplication into +0.0.
        # A new tensor instead of the old one's memory, which may be mapped from the checkpoint: written to, its pages
        # would stay for as long as anything of the checkpoint is mapped.
        linear.weight.data = (new.masked_fill(~kept, 0.0) + 0.0).to(linear.weight.dtype)
        masks[name] = kept.cpu()
        rows.append(
            {
                "name": name,
                "shape": list(kept.shape),
                "relative_error": float(error.sum().clamp(min=0) / total.sum().clamp(min=1e-30)),
                "sparsity": 1 - float(kept.float().mean()),
                "percdamp": percdamp,
                "seconds": round(seconds * linear.out_features / len(weight), 4),
            }
        )
    return masks, rows


def prune_layer(
    stream: Stream,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    known: list[Statistics],
    targets: list[Tensor] | None,
    recipe: Recipe,
) -> tuple[dict[str, Tensor], list[dict]]:
    """Prune one decoder layer that is on the device, and move the stream behind it.

    Args:
        known: statistics of the first groups, from the dense model; empty afterwards. The other groups are pruned one
            after the other, each on the inputs that the ones before it, pruned, produce.
        targets: hidden states of the dense model behind this layer, one per batch; the stream's own list where only
            they are needed; None where they are not.

    Returns:
        mask [out, in] on the CPU by name; log rows.
    """
    masks: dict[str, Tensor] = {}
    rows: list[dict] = []

    def prune(stage: list[dict[str, nn.Linear]], found: list[Statistics]) -> None:
        for group in stage:
            new_masks, new_rows = prune_group(group, found.pop(0), recipe)  # a Hessian is not needed any longer
            masks.update(new_masks)
            rows.extend(new_rows)

    count = len(known)
    prune(groups[:count], known)
    rest = groups[count:]
    if recipe.asymmetric and rest and len(rest[-1]) == 1 and len(groups) <= MOST_STAGES:
        *rest, last = rest
    else:
        last = None
    # A mixture of experts has too many groups for a forward pass each; there one pass serves them all.
    for stage in [[group] for group in rest] if len(groups) <= MOST_STAGES else [rest]:
        prune(stage, collect(stream, layer, index, stage))
    if last:
        assert targets is not None  # an asymmetric recipe comes with them
        ((name, linear),) = last.items()
        if residual := collect_residual(stream, layer, index, name, linear, targets):
            prune([last], [residual[0]])
            add_output(stream, linear, residual[1])
            return masks, rows
        prune([last], collect(stream, layer, index, [last]))
    if targets is not stream.hidden:  # otherwise the stream is the dense model's, and has moved
        stream.advance(layer, index, stream.hidden)
    return masks, rows


def prune_model(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    recipe: Recipe,
    device: torch.device,
    store: LayerStore,
    ignore: Sequence[str] = (),
    on_rows: Callable[[list[dict]], None] = lambda rows: None,
    activations_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Prune every decoder layer of `model` (on the CPU, in eval mode) in place.

    Args:
        batches: keyword arguments of the model: input_ids [batch, length] int64 and, where there is padding,
            attention_mask. With torch.distributed initialized, this process's share of the calibration set.
        store: takes every finished layer, and supplies the ones that an earlier run finished.
        on_rows: called after each layer with all log rows so far.
        activations_dir: folder for activations, which are otherwise kept in CPU memory.

    Returns:
        mask [out, in] (bool, True is kept) by name of the linear layer.

    Raises:
        UserError: unsupported architecture, non-finite weights or activations.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    prefix, layers = decoder_layers(model)
    chosen, _ = choose_linears(model, recipe.pattern, list(ignore))
    plan = shared_inputs(model, chosen)
    modules = dict(layers.named_modules(prefix=prefix))
    stream, delivery = Stream(model, layers, batches, device, activations_dir), Delivery(layers, device)
    # Hidden states of the dense model: a stream of their own where the pruned model's are needed beside them.
    dense_hidden = stream.hidden if recipe.dense_inputs else None
    if recipe.asymmetric:
        dense_hidden = stream.copy_hidden()
    masks: dict[str, Tensor] = {}
    rows: list[dict] = []
    bar = tqdm(layers, desc="pruning", unit="layer", disable=None if is_main_process() else True)
    for index, layer in enumerate(bar):
        started = time.perf_counter()
        groups = [{name: modules[name] for name in names} for names in plan[index]]
        done = store.has(index)
        if not done or dense_hidden is not None:
            delivery.bring(index)
        if not done:
            check_weights(groups)
        known: list[Statistics] = []
        if dense_hidden is not None:
            early = groups[:-1] if recipe.asymmetric else groups
            early = early if recipe.dense_inputs and not done else []
            known = collect(stream, layer, index, early, advance=dense_hidden)
        if done:
            layer_masks, layer_rows = store.load(index, layer)
            if dense_hidden is not stream.hidden:
                layer.to(device)
                stream.advance(layer, index, stream.hidden)
                layer.to("cpu")
        else:
            layer_masks, layer_rows = prune_layer(stream, layer, index, groups, known, dense_hidden, recipe)
            layer.to("cpu")
            for row in layer_rows:
                row["layer_seconds"] = round(time.perf_counter() - started, 3)
                row["peak_memory_mib"] = round(peak_memory_mib(device), 1)
            layer_masks = store.save(index, layer, layer_masks, layer_rows)
        masks |= layer_masks
        rows += layer_rows
        on_rows(rows)
        return_freed_memory()
        if layer_rows:
            bar.set_postfix(error=f"{sum(row['relative_error'] for row in layer_rows) / len(layer_rows):.4f}")
    return masks
