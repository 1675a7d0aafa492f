"""Prune a language model decoder layer by decoder layer, with one layer at a time on the device.

    calibration batches → embeddings → layer 0 → layer 1 → …, each pruned on the output of the pruned ones

structure.py reads off what a model looks like inside, statistics.py collects the inputs of its linear layers, and
solvers.py holds the mathematics of a single weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from sparsity.attention import use_blocked_attention
from sparsity.devices import keep_freed_memory, return_freed_memory, tf32
from sparsity.distributed import hide_bar, is_main_process
from sparsity.models import decoder_layers, head_counts
from sparsity.pts.activations import HiddenStates, LayerPrefetcher
from sparsity.pts.experts import Experts, at_once, one_by_one
from sparsity.pts.layer_store import LayerStore, MatrixLog
from sparsity.pts.permutation import find_channels, permute
from sparsity.pts.recipe import METHODS, Recipe, score_mask
from sparsity.pts.solvers import damp, fast_hessian, layer_error, least_squares, refit, sparsegpt
from sparsity.pts.statistics import (
    MAX_SEQUENTIAL_GROUPS,
    Statistics,
    Targets,
    add_output,
    collect,
    fill_up,
    stream_linears,
)
from sparsity.pts.structure import (
    DecoderLayer,
    Group,
    choose_weights,
    hidden_states_of,
    observe,
    reader,
    replaced_forward,
    watched,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bool, True is kept: [out, in] by name of the linear layer; of experts in the layout of their weight, by its name.
Masks = dict[str, Tensor]


@torch.no_grad()
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
) -> Masks:
    """Prune every decoder layer of `model` (on the CPU, in eval mode) in place.

    Args:
        batches: {"input_ids": int64 [batch, length]}, without padding; with torch.distributed initialized, this
            process's part of the calibration set. None are needed for methods whose scores read nothing but weights.
        store: takes every finished layer, and supplies the ones that an earlier run finished.
        on_rows: called after each layer with all log rows so far.
        activations_dir: folder for activations, which are otherwise kept in CPU memory.
        token_weights: for each batch, the weight of its tokens in the statistics; by default all are equal.

    Returns:
        masks of all pruned weights.

    Raises:
        UserError: unsupported architecture, non-finite weights or activations.
    """
    if device.type == "cpu":
        keep_freed_memory()  # from batch to batch; it is returned after every layer
    use_blocked_attention(model, device)
    layers = decoder_layers(model)[1]
    heads, prefetcher = head_counts(model.config), LayerPrefetcher(layers, device)
    masks: Masks = {}
    rows: list[MatrixLog] = []
    with one_by_one(model):
        plans = plan(model, recipe, ignore, bool(batches))
        # Experts see the tokens that the pruned model sends them, whatever the recipe.
        streams = (recipe.needs_pruned or any(each.transposed for each in plans), recipe.needs_dense)
        states = (
            HiddenStates(model, layers, batches, device, activations_dir, *streams, token_weights) if batches else None
        )
        for layer in (bar := tqdm(plans, "pruning", unit="layer", disable=hide_bar())):
            if store.has(layer.index):
                layer_masks, layer_rows = repeat_layer(states, layer, store, prefetcher)
            else:
                started = time.perf_counter()
                prefetcher.fetch(layer.index)
                layer_masks, layer_rows = prune_layer(states, layer, recipe, heads)
                layer.module.to("cpu")
                for row in layer_rows:
                    row.layer_seconds = round(time.perf_counter() - started, 3)
                layer_masks = store.save(layer.index, layer.module, layer_masks, layer_rows)
            masks |= layer_masks
            rows += layer_rows
            on_rows(rows)
            return_freed_memory()
            bar.set_postfix(
                error=f"{sum(row.relative_error or 0.0 for row in layer_rows) / max(1, len(layer_rows)):.4f}"
            )
        if states and recipe.asymmetric:
            rescale_final_norm(model, states)
    return masks


def prune_layer(
    states: HiddenStates | None, layer: DecoderLayer, recipe: Recipe, heads: tuple[int, int, int]
) -> tuple[Masks, list[MatrixLog]]:
    """Prune one decoder layer that is on the device, and move the hidden states, if any, past it.

    The dense model's pass comes first, and gives what the recipe takes from it. The other groups are pruned one after
    the other, each on the inputs that the pruned ones before it produce.

    Args:
        heads: number of query heads; of key and value heads; channels of each.

    Returns:
        masks on the CPU; log rows.

    Raises:
        UserError: a weight or an activation is NaN or infinite.
    """
    masks: Masks = {}
    rows: list[MatrixLog] = []
    layer.experts = Experts(layer.module, layer.transposed) if layer.transposed else None
    statistics: dict[int, Statistics] = {}
    targets: dict[int, Targets] = {}
    if states and states.dense is not None:
        statistics, targets = collect_dense(states, layer, recipe, heads)
    last = len(layer.groups) - 1
    at_end = last in targets and targets[last].inputs is not None
    steps: list[int | None] = list(range(last + 1))
    steps.insert(last if at_end else last + 1, None)  # experts: before a last linear that makes up for them
    for number in steps:
        if number is None:
            new_masks, new_rows = prune_experts(states, layer, recipe)
        else:
            if states and number not in statistics:
                statistics |= collect_pruned(states, layer, number, statistics, targets)
            new_masks, new_rows = prune_group(layer.groups[number], statistics.pop(number, None), recipe)
        masks |= new_masks
        rows += new_rows
    if states and at_end:
        add_output(states, reader(layer.groups[last]), targets[last])
    elif states:
        states.advance(layer, states.pruned)
    return masks, rows


def prune_experts(states: HiddenStates | None, layer: DecoderLayer, recipe: Recipe) -> tuple[Masks, list[MatrixLog]]:
    """Prune the experts of a decoder layer, each on the tokens that the router sends to it in the pruned model.

    Returns:
        masks on the CPU by name of the weight, in its layout; a log row for each expert's part of it.
    """
    masks: Masks = {}
    rows: list[MatrixLog] = []
    for weight, linears in layer.experts.linears.items() if layer.experts else ():
        path, _, leaf = f"{layer.name}.{weight}".rpartition(".")
        groups = [{f"{path}.{number}.{leaf}": linear} for number, linear in enumerate(linears)]
        size = at_once(linears[0].in_features)
        kept: list[Tensor] = []
        for start in range(0, len(groups), size):
            chunk = groups[start : start + size]
            collected = collect(states, layer, chunk, states.pruned) if states and states.pruned else []
            tokens = [round(each.tokens) for each in collected]
            if collected:
                fill_up(collected)
            for number, group in enumerate(chunk):
                new_masks, new_rows = prune_group(group, collected.pop(0) if collected else None, recipe)
                new_rows[0].tokens = tokens[number] if tokens else None
                kept += new_masks.values()
                rows += new_rows
        assert layer.experts is not None
        masks[f"{layer.name}.{weight}"] = layer.experts.join(weight, kept)
    if layer.experts:
        layer.experts.write_back()
        layer.experts = None
    return masks, rows


def collect_dense(
    states: HiddenStates, layer: DecoderLayer, recipe: Recipe, heads: tuple[int, int, int]
) -> tuple[dict[int, Statistics], dict[int, Targets]]:
    """Run the dense decoder layer and collect the statistics and targets that the recipe takes from it.

    Groups that write to the residual stream, or else the last one, are left for the pruned model's pass. Channels are
    then dealt to the groups of the pattern, if the recipe says so.

    Returns:
        statistics of the inputs, and the residual stream to fit, by number of group.
    """
    assert states.dense is not None
    groups, dtype = layer.groups, states.linear_dtype
    inner, last = stream_linears(states, layer) if recipe.asymmetric else (None, None)
    targets, stream = {}, None
    if last is not None:
        wide = [torch.Size((*shape[:-1], reader(groups[last]).in_features)) for shape in states.shapes]
        targets[last] = Targets(states.dense, states.allocate(wide, dtype))
    if inner is not None:
        targets[inner] = Targets(states.allocate(states.shapes, dtype))
        stream = reader(groups[inner]), targets[inner].stream
    later = {inner, len(groups) - 1} if recipe.asymmetric else set()
    early = [number for number in range(len(groups)) if recipe.dense_inputs and number not in later]
    pattern = recipe.pattern
    candidates = find_channels(groups, heads, pattern) if recipe.permute and pattern.m else []
    energies = {each.consumer: each.consumer.weight.new_zeros(each.consumer.in_features).float() for each in candidates}
    collected = collect(
        states, layer, [groups[n] for n in early], states.dense, advance=True, stream=stream, energies=energies
    )
    statistics = dict(zip(early, collected, strict=True))
    orders = permute(states, layer, candidates, energies, pattern)
    for number in early:
        if (order := orders.get(reader(groups[number]))) is not None:
            statistics[number].hessian = statistics[number].hessian[order][:, order]
    return statistics, targets


def collect_pruned(
    states: HiddenStates, layer: DecoderLayer, number: int, known: dict[int, Statistics], targets: dict[int, Targets]
) -> dict[int, Statistics]:
    """Run the decoder layer as pruned so far and collect the statistics of group `number`.

    A mixture of experts has too many groups for a forward pass each; there one pass serves all that are not `known`.

    Returns:
        statistics by number of group.
    """
    assert states.pruned is not None
    numbers = [number]
    if len(layer.groups) > MAX_SEQUENTIAL_GROUPS:
        numbers = [n for n in range(number, len(layer.groups)) if n not in known]
    if number in targets:
        return_freed_memory()  # of the passes before, which would add to the largest one
    groups = [layer.groups[n] for n in numbers]
    return dict(zip(numbers, collect(states, layer, groups, states.pruned, targets=targets.get(number)), strict=True))


def prune_group(group: Group, statistics: Statistics | None, recipe: Recipe) -> tuple[Masks, list[MatrixLog]]:
    """Prune the linear layers that share an input as one tall matrix and write the new weights into them.

    The statistics are used up: a second copy would be as large as the first.

    Returns:
        masks on the CPU; a log row for each linear layer.
    """
    started = time.perf_counter()
    sizes = [linear.out_features for linear in group.values()]
    weight = torch.cat([linear.weight for linear in group.values()]).float()
    errors, percdamp = None, None
    live = statistics.hessian.diagonal() > 0 if statistics else torch.zeros(())
    measured = bool(live.any())
    if measured and METHODS[recipe.method].needs_text:
        weight = weight * live  # the weights of inputs that never fire change no output, so they decide nothing
    if (score := METHODS[recipe.method].scores) is not None:
        norms = statistics.hessian.diagonal().clamp(min=0).sqrt() if statistics else None
        mask = score_mask(torch.cat([score(part, norms) for part in weight.split(sizes)]), recipe.pattern)
        pruned = weight.masked_fill(~mask, 0.0)
        if statistics:
            errors = relative_errors(weight, pruned, statistics.hessian)
    else:
        assert statistics is not None
        pruned, mask, errors, percdamp = updated_weight(weight, statistics, recipe, next(iter(group)), sizes)
    seconds = time.perf_counter() - started
    masks, rows = {}, []
    for (name, linear), new, kept in zip(group.items(), pruned.split(sizes), mask.split(sizes), strict=True):
        # Adding zero turns a -0.0 left by a multiplication into +0.0.
        # A new tensor instead of the old one's memory, which may be mapped from the checkpoint: once written to, its
        # pages would stay in memory for as long as anything of the checkpoint is mapped.
        linear.weight.data = (new.masked_fill(~kept, 0.0) + 0.0).to(linear.weight.dtype)
        masks[name] = kept.cpu()
        part = round(seconds * linear.out_features / sum(sizes), 4)
        rows.append(MatrixLog(name, list(kept.shape), None, 1 - float(kept.float().mean()), percdamp, part))
    if errors is not None and measured:  # else calibration never runs these layers
        for row, (error, energy) in zip(rows, (part.sum(1) for part in errors.split(sizes, dim=1)), strict=True):
            row.relative_error = float(error.clamp(min=0) / energy.clamp(min=1e-30))
    return masks, rows


@tf32(False)
def updated_weight(
    weight: Tensor, statistics: Statistics, recipe: Recipe, name: str, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Prune one weight [rows, cols] float32 by SparseGPT and refit what is left; the statistics are used up.

    Args:
        sizes: rows of each linear layer of the group.

    Returns:
        pruned weight; mask, True is kept; the relative error's numerator and denominator per row [2, rows]; the damping
        that was used.
    """
    hessian = statistics.hessian
    damping, inverse_factor, percdamp = damp(hessian, recipe.percdamp, recipe.shrinkage)
    if percdamp > recipe.percdamp and is_main_process():
        tqdm.write(f"warning: {name}: its Hessian needed damping {percdamp:g}, not {recipe.percdamp:g}")
    if statistics.cross is not None:
        weight = least_squares(weight, statistics.cross, inverse_factor)
        statistics.cross = None
    pruned, mask = sparsegpt(weight, inverse_factor, recipe.pattern, recipe.block_size, sizes)
    del inverse_factor  # as large as the Hessian
    error = None
    if recipe.refit_iterations:
        pruned, error = refit(weight, hessian, pruned, mask, recipe.refit_iterations)
    return pruned, mask, relative_errors(weight, pruned, hessian, damping, error), percdamp


@tf32(False)
def relative_errors(
    weight: Tensor, pruned: Tensor, hessian: Tensor, damping: Tensor | None = None, error: Tensor | None = None
) -> Tensor:
    """Numerator and denominator of the relative error per row [2, rows].

    Args:
        damping: what was added to the diagonal of the Hessian [cols], to be left out.
        error: the numerator [rows], damping included, if it is known.
    """
    change = pruned - weight
    sums = [layer_error(change, hessian) if error is None else error, layer_error(weight, fast_hessian(hessian))]
    if damping is not None:
        sums = [total - delta.square() @ damping for total, delta in zip(sums, (change, weight), strict=True)]
    return torch.stack(sums)


def repeat_layer(
    states: HiddenStates | None, layer: DecoderLayer, store: LayerStore, prefetcher: LayerPrefetcher
) -> tuple[Masks, list[MatrixLog]]:
    """Load a layer that an earlier run finished, and move the hidden states past it as that run did."""
    if states and states.dense is not None:
        prefetcher.fetch(layer.index)
        states.advance(layer, states.dense)
    masks, rows = store.load(layer.index, layer.module)
    if states and states.pruned is not None:
        layer.module.to(states.device)
        states.advance(layer, states.pruned)
        layer.module.to("cpu")
    return masks, rows


def final_norm(model: PreTrainedModel, states: HiddenStates) -> nn.Module | None:
    """The normalization that reads the last decoder layer's output, with a gain for each channel; None without one."""
    _, layers = decoder_layers(model)
    inside, last = set(layers.modules()), hidden_states_of(states.outputs[-1])
    norms = [
        m for m in model.modules() if m not in inside and [p.dim() for p in m.parameters(recurse=False)][:1] == [1]
    ]
    with replaced_forward(layers, lambda index: lambda *args, **kwargs: states.outputs[index]), watched(norms) as calls:
        model(input_ids=states.first_tokens, use_cache=False)
    return next((norm for norm, pairs in calls.items() if pairs[0][0] is last), None)


@torch.no_grad()
def rescale_final_norm(model: PreTrainedModel, states: HiddenStates) -> None:
    """Scale the final norm n by the factor s that minimizes Σ ‖s·n(p) - n(d)‖² over the calibration tokens.

    p and d are the outputs of the last decoder layer in the pruned and in the dense model. The error in p is nearly
    uncorrelated with d, so s is below 1, which makes the pruned model's logits less certain.
    """
    assert states.pruned is not None and states.dense is not None
    if (norm := final_norm(model, states)) is None:
        return
    norm.to(states.device)
    sums = torch.zeros(2, device=states.device)
    for weight, *streams in zip(states.token_weights, states.pruned, states.dense, strict=True):
        p, d = (norm(states.load(hidden).to(states.dtype)).float() for hidden in streams)
        sums += weight * torch.stack([(p * d).sum(), (p * p).sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    scale, hidden = sums[0] / sums[1], states.load(states.pruned[0])
    before, gains = norm(hidden), [(parameter, parameter.data) for parameter in norm.parameters(recurse=False)]
    for parameter, gain in gains:
        parameter.data = gain * scale
    if not torch.allclose(norm(hidden).float(), before.float() * scale, rtol=0.02, atol=1e-3):
        for parameter, gain in gains:  # which is no plain factor (Gemma multiplies by 1 + weight)
            parameter.data = gain
    norm.to("cpu")


def plan(model: PreTrainedModel, recipe: Recipe, ignore: Sequence[str], with_text: bool = True) -> list[DecoderLayer]:
    """The decoder layers with the linear layers to prune in them; without text each is a group of its own."""
    prefix, layers = decoder_layers(model)
    chosen, _ = choose_weights(model, recipe.pattern, list(ignore))
    names, transposed = observe(model, chosen)
    if not with_text:
        names = [[[name] for group in groups for name in group] for groups in names]
    return [
        DecoderLayer(
            layers[index],
            index,
            f"{prefix}.{index}",
            [{name: model.get_submodule(name) for name in group} for group in groups],
            transposed[index],
        )
        for index, groups in enumerate(names)
    ]
