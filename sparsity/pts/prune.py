"""Prune a language model decoder layer by decoder layer, with one layer at a time on the device.

    calibration batches → embeddings → layer 0 → layer 1 → …, each pruned on the output of the pruned ones

structure.py finds out what a model looks like inside, calibration.py what its linear layers are given, and solvers.py
holds the mathematics of a single weight.
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

from sparsity.attention import use_blocked_attention
from sparsity.devices import keep_freed_memory, peak_memory_mib, return_freed_memory, tf32
from sparsity.errors import UserError
from sparsity.models import decoder_layers, head_counts
from sparsity.distributed import hide_bar, is_main_process
from sparsity.pts.activations import HiddenStates, LayerPrefetcher
from sparsity.pts.calibration import (
    MAX_SEQUENTIAL_GROUPS,
    Statistics,
    Writers,
    add_output,
    collect,
    collect_missing,
    collect_residual,
    stream_writers,
)
from sparsity.pts.structure import choose_linears, shared_inputs
from sparsity.pts.final_norm import rescale_final_norm
from sparsity.pts.layer_store import LayerStore
from sparsity.pts.log import MatrixLog
from sparsity.pts.masks import magnitude_mask, wanda_mask
from sparsity.pts.permutation import permute, reorderable
from sparsity.pts.recipe import Recipe
from sparsity.pts.solvers import admm, damp, half_hessian, layer_error, least_squares, refit, sparsegpt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_weights(groups: list[dict[str, nn.Linear]]) -> None:
    """Refuse non-finite weights before calibration passes a NaN on, for which later layers would then be blamed.

    Raises:
        UserError: a weight is NaN or infinite; names it.
    """
    for group in groups:
        for name, linear in group.items():
            if not torch.isfinite(linear.weight).all():
                raise UserError(f"the weight of {name} holds NaN or infinite values; the checkpoint is damaged")


@tf32(False)
def new_weight(
    weight: Tensor, statistics: Statistics, recipe: Recipe, name: str
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Prune one weight [rows, cols] float32 by the recipe's method; the statistics are used up.

    Returns:
        pruned weight; mask, True is kept; the relative error's numerator and denominator per row [2, rows]; the
        damping that was used, None without a Hessian's inverse.
    """
    hessian, percdamp = statistics.hessian, None
    damping, error = weight.new_zeros(weight.shape[1]), None
    if recipe.method in ("magnitude", "wanda"):
        by_magnitude = recipe.method == "magnitude"
        mask = magnitude_mask(weight, recipe.pattern) if by_magnitude else wanda_mask(weight, hessian, recipe.pattern)
        pruned = weight * mask
    else:
        damping, inverse_factor, percdamp = damp(hessian, recipe.percdamp, recipe.shrinkage)
        if percdamp > recipe.percdamp and is_main_process():
            tqdm.write(f"warning: {name}: its Hessian needed damping {percdamp:g}, not {recipe.percdamp:g}")
        if statistics.cross is not None:
            weight = least_squares(weight, statistics.cross, inverse_factor)
            statistics.cross = None
        if recipe.admm_iterations:
            del inverse_factor  # as large as the Hessian
            start = weight * wanda_mask(weight, hessian, recipe.pattern)
            pruned, mask = admm(weight, hessian, start, recipe.pattern, recipe.admm_iterations)
        else:
            pruned, mask = sparsegpt(weight, inverse_factor, recipe.pattern, recipe.block_size)
            del inverse_factor
        if recipe.refit_iterations:
            pruned, error = refit(weight, hessian, pruned, mask, recipe.refit_iterations)
    change = pruned - weight
    error = layer_error(change, hessian) if error is None else error
    energy = layer_error(weight, half_hessian(hessian))
    without_damping = [sums - (delta.square() @ damping) for sums, delta in ((error, change), (energy, weight))]
    return pruned, mask, torch.stack(without_damping), percdamp


def prune_group(
    group: dict[str, nn.Linear], statistics: Statistics, recipe: Recipe
) -> tuple[dict[str, Tensor], list[MatrixLog]]:
    """Prune the linear layers that share an input as one tall matrix and write the new weights into them.

    The statistics are used up: a second copy would be as large as the first.

    Returns:
        mask [out, in] by name; a log row for each linear layer.
    """
    started = time.perf_counter()
    pruned, mask, errors, percdamp = new_weight(
        torch.cat([linear.weight for linear in group.values()]).float(), statistics, recipe, next(iter(group))
    )
    seconds = time.perf_counter() - started
    sizes = [linear.out_features for linear in group.values()]
    masks, rows = {}, []
    for (name, linear), new, kept, (error, energy) in zip(
        group.items(), pruned.split(sizes), mask.split(sizes), errors.split(sizes, dim=1), strict=True
    ):
        # Adding zero turns a -0.0 left by a multiplication into +0.0.
        # A new tensor instead of the old one's memory, which may be mapped from the checkpoint: once written to, its
        # pages would stay in memory for as long as anything of the checkpoint is mapped.
        linear.weight.data = (new.masked_fill(~kept, 0.0) + 0.0).to(linear.weight.dtype)
        masks[name] = kept.cpu()
        relative = float(error.sum().clamp(min=0) / energy.sum().clamp(min=1e-30))
        share = round(seconds * linear.out_features / sum(sizes), 4)
        rows.append(MatrixLog(name, list(kept.shape), relative, 1 - float(kept.float().mean()), percdamp, share))
    return masks, rows


@dataclass
class Observed:
    """What the dense model's pass through a decoder layer left for its pruning."""

    known: dict[int, Statistics] = field(default_factory=dict)  # statistics of the groups' inputs, by number of group
    writers: Writers = field(default_factory=Writers)  # groups to fit to the dense model's residual stream
    sums: list[Tensor] = field(default_factory=list)  # that stream behind writers.inner, for each batch
    inputs_of_last: list[Tensor] = field(default_factory=list)  # buffers, not yet written


def observe_dense(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    recipe: Recipe,
    heads: tuple[int, int, int],
) -> Observed:
    """Move the dense model's hidden states, where the recipe needs them, past a layer, and keep what it needs of them.

    Groups that write to the residual stream, or else the last one, are left for the pruned model's pass. The inputs of
    layers that may be reordered are then dealt anew (`heads`: of `head_counts`).
    """
    if states.dense is None:
        return Observed()
    writers = stream_writers(states, layer, index, groups) if recipe.asymmetric else Writers()
    observed = Observed(writers=writers)
    inner = None
    if writers.last is not None:
        wide = next(iter(groups[writers.last].values())).in_features
        shapes, dtype = [torch.Size((*shape[:-1], wide)) for shape in states.shapes], states.dense[0].dtype
        if writers.inner is None or wide < states.shapes[0][-1]:
            writers.inner, observed.inputs_of_last = None, states.allocate(shapes, dtype)
        else:
            inner = next(iter(groups[writers.inner].values()))
            observed.inputs_of_last, observed.sums = states.allocate_with_tail(shapes, states.shapes, dtype)
    later = {writers.inner, len(groups) - 1} if recipe.asymmetric else set()
    early = [number for number in range(len(groups)) if recipe.dense_inputs and number not in later]
    chosen = [groups[number] for number in early]
    reordered = reorderable(groups) if recipe.permute and recipe.pattern.m else {}
    # Statistics from this pass hold the energies of their inputs.
    energies = {
        linear: linear.weight.new_zeros(linear.in_features).float()
        for number, linear in reordered.items()
        if number not in early
    }
    found = collect(
        states, layer, index, chosen, states.dense, True, energies=energies, writer=inner, sums=observed.sums
    )
    observed.known = dict(zip(early, found, strict=True))
    if reordered:
        sums = {
            number: observed.known[number].hessian.diagonal() if number in early else energies[linear]
            for number, linear in reordered.items()
        }
        orders = permute(states, layer, index, groups, sums, heads, recipe.pattern)
        for number, order in orders.items():
            if number in observed.known:
                observed.known[number].reorder(order)
    return observed


def prune_layer(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    observed: Observed,
    recipe: Recipe,
) -> tuple[dict[str, Tensor], list[MatrixLog]]:
    """Prune one decoder layer that is on the device, and move the pruned model's hidden states past it.

    Groups whose statistics are not known from the dense model (`observed.known`, empty afterwards) are pruned one after
    the other, each on the inputs that the pruned ones before it produce.

    Returns:
        mask [out, in] on the CPU by name; log rows.
    """
    masks: dict[str, Tensor] = {}
    rows: list[MatrixLog] = []

    def prune(numbers: list[int], found: list[Statistics]) -> None:
        for number in numbers:
            new_masks, new_rows = prune_group(groups[number], found.pop(0), recipe)  # its Hessian is then not needed
            masks.update(new_masks)
            rows.extend(new_rows)

    known, writers = observed.known, observed.writers
    together = len(groups) > MAX_SEQUENTIAL_GROUPS
    for number, group in enumerate(groups):
        name, linear = next(iter(group.items()))
        if name in masks:
            continue
        if number in known:
            prune([number], [known.pop(number)])
        elif number == writers.inner:
            prune([number], [collect_missing(states, layer, index, name, linear, observed.sums)])
        elif number == writers.last:
            return_freed_memory()  # of the passes before, which would add to the largest one
            found = [collect_last(states, layer, index, groups, observed)]
            return_freed_memory()
            prune([number], found)
            add_output(states, linear, observed.inputs_of_last)
            return masks, rows
        else:
            assert states.pruned is not None
            # A mixture of experts has too many groups for a forward pass each; there one pass serves them all.
            stage = [n for n in range(number, len(groups)) if n not in known] if together else [number]
            prune(stage, collect(states, layer, index, [groups[n] for n in stage], states.pruned))
    if states.pruned is not None:
        states.advance(layer, index, states.pruned)
    return masks, rows


def collect_last(
    states: HiddenStates, layer: nn.Module, index: int, groups: list[dict[str, nn.Linear]], observed: Observed
) -> Statistics:
    """Statistics of the last group, without running attention again where its inputs at the end were kept."""
    writers = observed.writers
    assert writers.last is not None
    name, linear = next(iter(groups[writers.last].items()))
    if writers.inner is None or writers.parent is None:
        return collect_residual(states, layer, index, name, linear, observed.inputs_of_last)
    inner = next(iter(groups[writers.inner].values()))
    if inner.in_features != inner.out_features:
        return collect_residual(states, layer, index, name, linear, observed.inputs_of_last)

    def outputs_of_parent(batch: int) -> Callable:
        # Before the last group's inputs are written to this memory.
        output = states.linear(inner, observed.sums[batch].to(states.device, non_blocking=True))

        def forward(*args: object, **kwargs: object) -> object:
            return (output, *[None] * (writers.returned - 1)) if writers.returned else output

        return forward

    parent = layer.get_submodule(writers.parent)
    return collect_residual(states, layer, index, name, linear, observed.inputs_of_last, outputs_of_parent, parent)


def prune_model(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    recipe: Recipe,
    device: torch.device,
    store: LayerStore,
    ignore: Sequence[str] = (),
    on_rows: Callable[[list[MatrixLog]], None] = lambda rows: None,
    activations_dir: Path | None = None,
    token_weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Prune every decoder layer of `model` (on the CPU, in eval mode) in place, and rescale its final norm.

    Args:
        batches: keyword arguments of the model: input_ids [batch, length] int64 and, where there is padding,
            attention_mask. With torch.distributed initialized, this process's share of the calibration set.
        store: takes every finished layer, and supplies the ones that an earlier run finished.
        on_rows: called after each layer with all log rows so far.
        activations_dir: folder for activations, which are otherwise kept in CPU memory.
        token_weights: for each batch, what its tokens count in the statistics; by default all count alike.

    Returns:
        mask [out, in] (bool, True is kept) by name of the linear layer.

    Raises:
        UserError: unsupported architecture, non-finite weights or activations.
    """
    if device.type == "cpu":
        keep_freed_memory()  # from batch to batch; it is returned after every layer
    use_blocked_attention(model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    prefix, layers = decoder_layers(model)
    chosen, _ = choose_linears(model, recipe.pattern, list(ignore))
    plan = shared_inputs(model, chosen)
    modules = dict(layers.named_modules(prefix=prefix))
    heads = head_counts(model.config)
    states = HiddenStates(
        model,
        layers,
        batches,
        device,
        activations_dir,
        needs_pruned=recipe.needs_pruned,
        needs_dense=recipe.needs_dense,
        token_weights=token_weights,
    )
    prefetcher = LayerPrefetcher(layers, device)
    masks: dict[str, Tensor] = {}
    rows: list[MatrixLog] = []
    bar = tqdm(layers, desc="pruning", unit="layer", disable=hide_bar())
    for index, layer in enumerate(bar):
        groups = [{name: modules[name] for name in names} for names in plan[index]]
        if store.has(index, layer, {name: linear for group in groups for name, linear in group.items()}):
            layer_masks, layer_rows = repeat_layer(states, layer, index, store, prefetcher)
        else:
            started = time.perf_counter()
            prefetcher.fetch(index)
            check_weights(groups)
            observed = observe_dense(states, layer, index, groups, recipe, heads)
            layer_masks, layer_rows = prune_layer(states, layer, index, groups, observed, recipe)
            del observed  # its buffers are as large as all hidden states
            layer.to("cpu")
            for row in layer_rows:
                row.layer_seconds = round(time.perf_counter() - started, 3)
                row.peak_memory_mib = round(peak_memory_mib(device), 1)
            layer_masks = store.save(index, layer, layer_masks, layer_rows)
        masks |= layer_masks
        rows += layer_rows
        on_rows(rows)
        return_freed_memory()
        if layer_rows:
            bar.set_postfix(error=f"{sum(row.relative_error or 0.0 for row in layer_rows) / len(layer_rows):.4f}")
    if recipe.asymmetric:
        rescale_final_norm(model, states)
    return masks


def repeat_layer(
    states: HiddenStates, layer: nn.Module, index: int, store: LayerStore, prefetcher: LayerPrefetcher
) -> tuple[dict[str, Tensor], list[MatrixLog]]:
    """Load a layer that an earlier run finished, and move the hidden states past it as that run did."""
    if states.dense is not None:
        prefetcher.fetch(index)
        states.advance(layer, index, states.dense)
    masks, rows = store.load(index, layer)
    if states.pruned is not None:
        layer.to(states.device)
        states.advance(layer, index, states.pruned)
        layer.to("cpu")
    return masks, rows
