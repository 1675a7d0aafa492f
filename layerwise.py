"""Prune a language model decoder layer by decoder layer, with one layer at a time on the device.

    calibration batches → embeddings → layer 0 → layer 1 → …, each pruned on the output of the pruned ones

What a model looks like inside is found out in decoder.py, the mathematics of a single weight is in sparsegpt.py.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import LayerStore
from decoder import Stop, Stream, choose_linears, decoder_layers, shared_inputs
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


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the three named choices for SparseGPT."""

    method: str = "sparsegpt"  # or "wanda", "magnitude"
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    admm_iterations: int = 0  # mask search, in place of SparseGPT's column loop
    asymmetric: bool = False  # fit the last linear of each layer to the dense model's output, not to its own
    reconstruct_epochs: int = 0  # passes of gradient descent over the calibration set, per decoder layer
    reconstruct_lr: float = 1e-4


# Damping ten times the paper's 0.01 holds the refitted weights nearer to the dense ones: a little is lost on text like
# the calibration set's, more is won on other text (benchmarks/README.md).
QUALITY = {
    "fast": Recipe(percdamp=0.1, refit_iterations=6, asymmetric=True),
    "balanced": Recipe(percdamp=0.1, refit_iterations=4, admm_iterations=16, asymmetric=True),
    "best": Recipe(percdamp=0.1, refit_iterations=6, admm_iterations=30, asymmetric=True, reconstruct_epochs=2),
}

# Decoder layers have about four groups of linear layers: before attention, after it, before and after the activation.
MOST_STAGES = 8


# -------------------------------------------------------------------------------- calibration statistics


def add_gram(hessian: Tensor, inputs: Tensor) -> None:
    """hessian [cols, cols] += inputsᵀ inputs for inputs [tokens, cols], both float32."""
    if inputs.device.type == "cpu":
        # NumPy sees that both factors are one array and computes half of the symmetric product (BLAS syrk).
        array = inputs.numpy()
        hessian += torch.from_numpy(array.T @ array)
    else:
        hessian.addmm_(inputs.t(), inputs)


@dataclass
class Statistics:
    """What calibration tells about linear layers that share an input X [cols, tokens]; means over all tokens."""

    hessian: Tensor  # X Xᵀ [cols, cols] float32
    cross: Tensor | None = None  # Y Xᵀ [rows, cols] float32, for a wanted output Y [rows, tokens]
    tokens: int = 0

    def add(self, inputs: Tensor, wanted: Tensor | None = None) -> None:
        """Take in inputs [tokens, cols] and, with a cross product, wanted outputs [tokens, rows]."""
        inputs = inputs.float()
        add_gram(self.hessian, inputs)
        if wanted is not None:
            self.cross.addmm_(wanted.float().t(), inputs)
        self.tokens += len(inputs)

    def finish(self, name: str) -> None:
        """Sum over all processes and divide by the tokens.

        Raises:
            UserError: an activation was NaN or infinite; names the linear layer.
        """
        sums = [self.hessian] + ([self.cross] if self.cross is not None else [])
        count = torch.tensor(float(self.tokens), device=self.hessian.device)
        if dist.is_initialized():
            for tensor in [*sums, count]:
                dist.all_reduce(tensor)
        for tensor in sums:
            tensor /= count.clamp(min=1)
            if not torch.isfinite(tensor).all():
                raise UserError(f"the input of {name} is NaN or infinite in calibration; try --dtype bf16 or fp32")


@torch.no_grad()
def collect(stream: Stream, layer: nn.Module, index: int, groups: list[dict[str, nn.Linear]]) -> list[Statistics]:
    """Run the stream through the layer as far as needed to see the inputs of `groups`; padding is left out."""
    found = []
    for group in groups:
        width = next(iter(group.values())).in_features
        found.append(Statistics(torch.zeros(width, width, device=stream.device)))

    def hook(statistics: Statistics, keep: Tensor | None) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            inputs = args[0].flatten(0, -2)
            statistics.add(inputs[keep] if keep is not None and len(keep) == len(inputs) else inputs)
            if len(groups) == 1:
                raise Stop  # what lies behind the only wanted input need not be computed

        return add

    for batch, keep in enumerate(stream.keep):
        handles = [
            next(iter(group.values())).register_forward_pre_hook(hook(statistics, keep))
            for group, statistics in zip(groups, found, strict=True)
        ]
        with suppress(Stop):
            stream.run(layer, index, batch)
        for handle in handles:
            handle.remove()
    for group, statistics in zip(groups, found, strict=True):
        statistics.finish(next(iter(group)))
    return found


@torch.no_grad()
def collect_residual(stream: Stream, layer: nn.Module, index: int, name: str, linear: nn.Linear, targets: list[Tensor]):
    """Statistics of the layer's last linear, wanting it to make up for all that the layer's output has lost so far.

    Where the linear's output is added to the residual stream R, the output Y that would bring the layer to its target T
    (the dense model's hidden states) is T - R. Fitting W X to Y instead of to the dense W X is the asymmetric
    calibration of GPTAQ (Li et al. 2025), with the residual's own error in it.

    Returns:
        Statistics with `cross`, or None where the linear's output does not simply add to the layer's (Gemma's
        normalizes it first) or was not seen.
    """
    rows, cols = linear.weight.shape
    found = Statistics(torch.zeros(cols, cols, device=stream.device), torch.zeros(rows, cols, device=stream.device))
    seen: list[Tensor] = []

    def silence(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen[:] = [args[0], output]
        return torch.zeros_like(output)

    for batch, keep in enumerate(stream.keep):
        seen.clear()
        handle = linear.register_forward_hook(silence)
        residual = stream.run(layer, index, batch)
        handle.remove()
        if not seen or seen[1].numel() != residual.numel() or seen[1].shape[-1] != residual.shape[-1]:
            return None
        if batch == 0:
            added = stream.run(layer, index, batch) - residual
            if (added - seen[1].view_as(added)).float().norm() > 0.05 * added.float().norm():
                return None
        wanted = targets[batch].to(stream.device, non_blocking=True).float() - residual.float()
        if linear.bias is not None:
            wanted -= linear.bias.float()
        inputs, wanted = seen[0].flatten(0, -2), wanted.flatten(0, -2)
        found.add(*(t if keep is None else t[keep] for t in (inputs, wanted)))
    found.finish(name)
    return found


# ---------------------------------------------------------------------------------------------- pruning


def prune_group(
    group: dict[str, nn.Linear], statistics: Statistics, recipe: Recipe
) -> tuple[dict[str, Tensor], list[dict]]:
    """Prune the linear layers that share an input as one tall matrix and write the new weights into them.

    Returns:
        mask [out, in] by name; a log row by linear layer.
    """
    started = time.perf_counter()
    weight, hessian = torch.cat([linear.weight for linear in group.values()]).float(), statistics.hessian
    if not torch.isfinite(weight).all():
        bad = next(name for name, linear in group.items() if not torch.isfinite(linear.weight).all())
        raise UserError(f"the weight of {bad} holds NaN or infinite values; the checkpoint is damaged")
    damping = None
    if recipe.method == "magnitude":
        mask = magnitude_mask(weight, recipe.pattern)
        pruned = weight * mask
    elif recipe.method == "wanda":
        mask = wanda_mask(weight, hessian, recipe.pattern)
        pruned = weight * mask
    else:
        damped, inverse_factor, damping = damp(hessian, recipe.percdamp)
        if damping > recipe.percdamp and is_main_process():
            tqdm.write(f"warning: {next(iter(group))}: its Hessian needed damping {damping:g}, not {recipe.percdamp:g}")
        if statistics.cross is not None:
            weight = least_squares(weight, statistics.cross, damped - hessian, inverse_factor)
        if recipe.admm_iterations:
            del inverse_factor  # as large as the Hessian, which for 11008 columns is 485 MB
            start = weight * wanda_mask(weight, damped, recipe.pattern)
            pruned, mask = admm(weight, damped, start, recipe.pattern, recipe.admm_iterations)
        else:
            pruned, mask = sparsegpt(weight, inverse_factor, recipe.pattern, recipe.block_size)
        if recipe.refit_iterations:
            pruned = refit(weight, damped, pruned, mask, recipe.refit_iterations)
    lost, energy = layer_error(pruned - weight, hessian), layer_error(weight, hessian)
    seconds = time.perf_counter() - started
    sizes = [linear.out_features for linear in group.values()]
    masks, rows = {}, []
    for (name, linear), *parts in zip(
        group.items(), *(t.split(sizes) for t in (pruned, mask, lost, energy)), strict=True
    ):
        new, kept, error, total = parts
        # Adding zero turns a -0.0 left by a multiplication into +0.0.
        linear.weight.data.copy_(new.masked_fill(~kept, 0.0) + 0.0)
        masks[name] = kept.cpu()
        rows.append(
            {
                "name": name,
                "shape": list(kept.shape),
                "relative_error": float(error.sum() / total.sum().clamp(min=1e-30)),
                "sparsity": 1 - float(kept.float().mean()),
                "percdamp": damping,
                "seconds": round(seconds * linear.out_features / len(weight), 4),
            }
        )
    return masks, rows


def reconstruct(
    stream: Stream,
    layer: nn.Module,
    index: int,
    masks: dict[nn.Parameter, Tensor],
    targets: list[Tensor],
    recipe: Recipe,
) -> None:
    """Tune the kept weights and the norms of one decoder layer until its output resembles the dense model's.

    Adam on ‖layer(stream) - target‖² / ‖target‖², batch by batch, the masks held. Unlike the least-squares refit it
    sees the whole layer at once and repairs the errors of the layers before. (Cf. Guo et al., "EBFT", 2024.)
    """
    parameters = [p for p in layer.parameters() if p.ndim == 1 or p in masks]
    half = next(iter(masks)).dtype
    layer.float()
    compute = half if half != torch.float32 else None
    optimizer = torch.optim.Adam(parameters, lr=recipe.reconstruct_lr, betas=(0.9, 0.95))
    steps = recipe.reconstruct_epochs * len(targets)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for step in range(steps):
            batch = step % len(targets)
            output = stream.run(layer, index, batch, stream.hidden[batch].float(), compute)
            target = targets[batch].to(stream.device, non_blocking=True).float()
            loss = (output.float() - target).square().mean() / target.square().mean()
            loss.backward()
            for parameter in parameters:
                if dist.is_initialized():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
                if parameter in masks:
                    parameter.grad *= masks[parameter]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
        if parameter in masks:
            parameter.data.masked_fill_(~masks[parameter], 0.0)
    layer.to(half)


def is_main_process() -> bool:
    """True in a single process and on rank 0 of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the CUDA device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def prune_layer(
    stream: Stream,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    targets: list[Tensor],
    recipe: Recipe,
):
    """Prune one decoder layer that is on the device: group after group, each on inputs that the ones before produced.

    Returns:
        mask [out, in] on the CPU by name; log rows.
    """
    masks: dict[str, Tensor] = {}
    rows: list[dict] = []
    # A mixture of experts has too many groups for a forward pass each; there one pass serves them all.
    stages = [[group] for group in groups] if len(groups) <= MOST_STAGES else [groups]
    for stage in stages:
        if recipe.method == "magnitude":
            # Without calibration the errors that are logged are those of the weights themselves.
            found = [Statistics(torch.eye(next(iter(g.values())).in_features, device=stream.device)) for g in stage]
        elif recipe.asymmetric and stage is stages[-1] and len(stage) == 1 and len(stage[0]) == 1:
            ((name, linear),) = stage[0].items()
            residual = collect_residual(stream, layer, index, name, linear, targets)
            found = [residual] if residual else collect(stream, layer, index, stage)
        else:
            found = collect(stream, layer, index, stage)
        for group, statistics in zip(stage, found, strict=True):
            new_masks, new_rows = prune_group(group, statistics, recipe)
            masks |= new_masks
            rows += new_rows
    if recipe.reconstruct_epochs:
        linears = {name: linear for group in groups for name, linear in group.items()}
        on_device = {linear.weight: masks[name].to(stream.device) for name, linear in linears.items()}
        reconstruct(stream, layer, index, on_device, targets, recipe)
    return masks, rows


def prune_model(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    recipe: Recipe,
    device: torch.device,
    store: LayerStore,
    ignore: list[str] = (),
    on_rows: Callable[[list[dict]], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Prune every decoder layer of `model` (on the CPU, in eval mode) in place.

    Args:
        batches: keyword arguments of the model: input_ids [batch, length] int64 and, where there is padding,
            attention_mask. With torch.distributed initialized, this process's share of the calibration set.
        store: takes every finished layer, and supplies the ones that an earlier run finished.
        on_rows: called after each layer with all log rows so far.

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
    stream = Stream(model, layers, batches, device)
    dense_hidden = list(stream.hidden) if recipe.asymmetric or recipe.reconstruct_epochs else []
    masks: dict[str, Tensor] = {}
    rows: list[dict] = []
    bar = tqdm(
        layers,
        desc="pruning",
        unit="layer",
        disable=None if is_main_process() else True,
    )
    for index, layer in enumerate(bar):
        started = time.perf_counter()
        if dense_hidden:
            layer.to(device)
            stream.advance(layer, index, dense_hidden)  # what the dense model gives: the target, and its next input
        finished = store.load(index, layer)
        layer.to(device)
        if finished is None:
            groups = [{name: modules[name] for name in names} for names in plan[index]]
            layer_masks, layer_rows = prune_layer(stream, layer, index, groups, dense_hidden, recipe)
        else:
            layer_masks, layer_rows = finished
        stream.advance(layer, index, stream.hidden)
        layer.to("cpu")
        if finished is None:
            for row in layer_rows:
                row["layer_seconds"] = round(time.perf_counter() - started, 3)
                row["peak_memory_mib"] = round(peak_memory_mib(device), 1)
            layer_masks = store.save(index, layer, layer_masks, layer_rows)
        masks |= layer_masks
        rows += layer_rows
        on_rows(rows)
        if layer_rows:
            bar.set_postfix(error=f"{sum(row['relative_error'] for row in layer_rows) / len(layer_rows):.4f}")
    return masks
