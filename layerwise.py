"""Prune a language model decoder layer by decoder layer, with one layer at a time on the device.

    calibration batches → embeddings → layer 0 → layer 1 → …, each pruned on the output of the pruned ones

The list of decoder layers, the arguments each is called with and which linear layers share an input are all observed
on the running model, so no architecture is named here. The mathematics is in sparsegpt.py.
"""

from __future__ import annotations

import fnmatch
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import LayerStore
from sparsegpt import Pattern, admm, bf16_is_faster, damp, layer_error, magnitude_mask, refit, sparsegpt, wanda_mask
from utils import UserError


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the three named choices for SparseGPT."""

    method: str = "sparsegpt"  # or "wanda", "magnitude"
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    admm_iterations: int = 0  # mask search
    reconstruct_epochs: int = 0  # passes of gradient descent over the calibration set, per decoder layer
    reconstruct_lr: float = 1e-4


QUALITY = {
    "fast": Recipe(refit_iterations=8),
    "balanced": Recipe(refit_iterations=6, admm_iterations=20),
    "best": Recipe(refit_iterations=8, admm_iterations=30, reconstruct_epochs=3),
}

# Decoder layers have about four groups of linear layers: before attention, after it, before and after the activation.
MOST_STAGES = 8


class _Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


# -------------------------------------------------------------------------------- observing the model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest ModuleList of config.num_hidden_layers equal modules."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        raise UserError(
            f"found no list of {count} decoder layers in {type(model).__name__}; this architecture is not supported"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def choose_linears(model: nn.Module, pattern: Pattern, ignore: list[str]) -> tuple[set[str], dict[str, str]]:
    """Which weights to prune.

    Returns:
        names of the linear layers to prune; name → reason for every other weight matrix inside the decoder layers.

    Raises:
        UserError: nothing is left to prune, for example because the model has Conv1D instead of linear layers (GPT-2).
    """
    prefix, layers = decoder_layers(model)
    chosen, left_dense = set(), {}
    for name, module in layers.named_modules(prefix=prefix):
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if not matrices:
            continue
        if not isinstance(module, nn.Linear):
            left_dense[name] = f"{type(module).__name__} is not a linear layer"
        elif any(fnmatch.fnmatch(name, glob) for glob in ignore):
            left_dense[name] = "--ignore"
        elif pattern.m and (module.in_features % pattern.m or module.out_features % pattern.m):
            left_dense[name] = f"shape {tuple(module.weight.shape)} is not divisible by {pattern.m}"
        else:
            chosen.add(name)
    for glob in ignore:
        if not any(fnmatch.fnmatch(name, glob) for name in left_dense):
            raise UserError(
                f"--ignore {glob} matches no linear layer of the model; names look like {min(chosen, default='')}"
            )
    if not chosen:
        reasons = sorted(set(left_dense.values()))
        raise UserError(f"{type(model).__name__} is not supported: no linear layer to prune ({'; '.join(reasons)})")
    return chosen, left_dense


def shared_inputs(model: nn.Module, chosen: set[str]) -> list[list[list[str]]]:
    """For each decoder layer, groups of linear layers that read the same tensor (q, k and v, say), in running order.

    Found with one forward pass over eight tokens. Layers that did not run in it (experts) come last, one to a group.
    """
    prefix, layers = decoder_layers(model)
    calls: dict[str, Tensor] = {}  # holding the tensors keeps their ids apart

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            calls.setdefault(name, args[0])

        return hook

    modules = dict(layers.named_modules(prefix=prefix))
    handles = [modules[name].register_forward_pre_hook(note(name)) for name in chosen]
    try:
        with torch.inference_mode():
            model(input_ids=torch.arange(8).remainder(model.config.get_text_config().vocab_size)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    grouped: list[list[list[str]]] = []
    for index in range(len(layers)):
        inside = f"{prefix}.{index}."
        groups: dict[int, list[str]] = {}
        for name, tensor in calls.items():
            if name.startswith(inside):
                groups.setdefault(id(tensor), []).append(name)
        idle = sorted(name for name in chosen if name.startswith(inside) and name not in calls)
        grouped.append([*groups.values(), *([name] for name in idle)])
    return grouped


@contextmanager
def _replaced_forward(layers: nn.ModuleList, forward: Callable[[int], Callable]) -> Iterator[None]:
    for index, layer in enumerate(layers):
        layer.forward = forward(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def returns_tuple(model: nn.Module, layers: nn.ModuleList) -> list[bool]:
    """Whether each decoder layer returns a tuple (older architectures) or the hidden states themselves."""
    tuples: list[bool] = [False] * len(layers)

    def watch(index: int) -> Callable:
        original = layers[index].forward

        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            tuples[index] = isinstance(output, tuple)
            return output

        return forward

    with _replaced_forward(layers, watch), torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return tuples


def record_calls(model: nn.Module, layers: nn.ModuleList, tuples: list[bool], batch: dict[str, Tensor]):
    """Run all but the decoder layers on one batch.

    Returns:
        the hidden states [batch, length, width] that enter the first layer; for each layer its (args, kwargs) apart
        from the hidden states. Masks and position embeddings may differ from layer to layer (sliding windows).
    """
    first: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []

    def recorder(index: int) -> Callable:
        def forward(*args, **kwargs):
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            first[:] = first or [hidden]
            calls.append((tuple(args[1:]), kwargs))
            if index == len(layers) - 1:
                raise _Stop
            return (hidden,) if tuples[index] else hidden

        return forward

    with _replaced_forward(layers, recorder), torch.no_grad(), suppress(_Stop):
        model(**batch, use_cache=False)
    return first[0], calls


# ------------------------------------------------------------------------------------- calibration stream


class Stream:
    """The calibration set on its way through the model: hidden states per batch, in CPU memory, pinned for CUDA.

    Batches without padding and of one shape share their layers' arguments; others keep their own.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, batches: list[dict[str, Tensor]], device: torch.device):
        self.device = device
        self.hidden: list[Tensor] = []
        self.keep: list[Tensor | None] = []  # bool [batch · length], False on padding
        self.calls: list[list[tuple[tuple, dict]]] = []
        # Float32 models run the linear layers of their calibration passes in bfloat16 where the CPU has instructions
        # for it (twice the speed); weights, residual stream and Hessians stay float32.
        half = device.type == "cpu" and model.dtype == torch.float32 and bf16_is_faster(device)
        self.autocast = torch.bfloat16 if half else None
        tuples, seen = returns_tuple(model, layers), {}
        for batch in batches:
            hidden, calls = record_calls(model, layers, tuples, batch)
            mask = batch.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            self.hidden.append(self._store(hidden))
            self.keep.append(mask.flatten().bool().to(device) if padded else None)
            self.calls.append(calls if padded else seen.setdefault(hidden.shape, calls))

    def _store(self, hidden: Tensor) -> Tensor:
        hidden = hidden.detach().to("cpu")
        return hidden.pin_memory() if self.device.type == "cuda" else hidden

    def run(self, layer: nn.Module, index: int, batch: int, hidden: Tensor | None = None, autocast=None) -> Tensor:
        """Output [batch, length, width] of decoder layer `index` for one batch (on the stream, or on `hidden`)."""
        autocast = autocast or self.autocast
        args, kwargs = _to_device(self.calls[batch][index], self.device)
        hidden = (self.hidden[batch] if hidden is None else hidden).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, hidden: list[Tensor]) -> None:
        """Replace each of `hidden` (one per batch) by the layer's output for it."""
        for batch in range(len(hidden)):
            hidden[batch] = self._store(self.run(layer, index, batch, hidden[batch]))


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


def add_gram(hessian: Tensor, inputs: Tensor) -> None:
    """hessian [cols, cols] += inputsᵀ inputs for inputs [tokens, cols], both float32."""
    if inputs.device.type == "cpu":
        # NumPy sees that both factors are one array and computes half of the symmetric product (BLAS syrk).
        array = inputs.numpy()
        hessian += torch.from_numpy(array.T @ array)
    else:
        hessian.addmm_(inputs.t(), inputs)


@torch.no_grad()
def collect_hessians(stream: Stream, layer: nn.Module, index: int, groups: list[dict[str, nn.Linear]]) -> list[Tensor]:
    """X Xᵀ / tokens in float32 for each group's input X, without padding, summed over all processes.

    Raises:
        UserError: an activation is NaN or infinite; names the linear layer.
    """
    hessians, tokens, fired = [], [0] * len(groups), 0
    for group in groups:
        width = next(iter(group.values())).in_features
        hessians.append(torch.zeros(width, width, device=stream.device))

    def hook(module: nn.Module, args: tuple, which: int = 0, keep: Tensor | None = None) -> None:
        inputs = args[0].flatten(0, -2)
        if keep is not None and len(keep) == len(inputs):
            inputs = inputs[keep]
        add_gram(hessians[which], inputs.float())
        tokens[which] += len(inputs)
        if len(groups) == 1:
            raise _Stop  # what lies behind the only wanted input need not be computed

    for batch in range(len(stream.hidden)):
        handles = [
            next(iter(group.values())).register_forward_pre_hook(
                lambda m, a, which=which, keep=stream.keep[batch]: hook(m, a, which, keep)
            )
            for which, group in enumerate(groups)
        ]
        try:
            stream.run(layer, index, batch)
        except _Stop:
            fired += 1
        finally:
            for handle in handles:
                handle.remove()
    for which, group in enumerate(groups):
        if dist.is_initialized():
            total = torch.tensor(float(tokens[which]), device=stream.device)
            dist.all_reduce(hessians[which])
            dist.all_reduce(total)
            tokens[which] = int(total)
        hessians[which] /= max(tokens[which], 1)
        if not torch.isfinite(hessians[which]).all():
            raise UserError(
                f"the input of {next(iter(group))} is NaN or infinite during calibration; try --dtype bf16 or fp32"
            )
    return hessians


# ---------------------------------------------------------------------------------------------- pruning


def prune_group(group: dict[str, nn.Linear], hessian: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], list[dict]]:
    """Prune the linear layers that share an input as one tall matrix and write the new weights into them.

    Returns:
        mask [out, in] by name; a log row by linear layer.
    """
    started = time.perf_counter()
    weight = torch.cat([linear.weight for linear in group.values()]).float()
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
        pruned, mask = sparsegpt(weight, inverse_factor, recipe.pattern, recipe.block_size)
        del inverse_factor
        if recipe.admm_iterations:
            pruned, mask = admm(weight, damped, pruned, recipe.pattern, recipe.admm_iterations)
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
            hessians = [torch.eye(next(iter(g.values())).in_features, device=stream.device) for g in stage]
        else:
            hessians = collect_hessians(stream, layer, index, stage)
        for group, hessian in zip(stage, hessians, strict=True):
            new_masks, new_rows = prune_group(group, hessian, recipe)
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
    dense_hidden = list(stream.hidden) if recipe.reconstruct_epochs else []
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
        if recipe.reconstruct_epochs:
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
