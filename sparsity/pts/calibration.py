"""Calibration statistics of linear layers: second moments of their inputs, and products with missing outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster, tf32
from sparsity.errors import UserError
from sparsity.pts.activations import HiddenStates
from sparsity.pts.structure import Stop, replaced_forward

TOKENS_AT_ONCE = 1024  # copied to float32 and multiplied at a time: enough for full speed, little memory
HALF_TOKENS_AT_ONCE = 4096  # of bfloat16 inputs, which are not copied
COLUMNS_AT_ONCE = 128  # in products of which only the upper triangle is wanted
MAX_TOKEN_WEIGHT = 10.0  # before weights are brought to a mean of 1: of a token whose target is nearly zero

MAX_SEQUENTIAL_GROUPS = 8  # decoder layers have about four; a mixture of experts has many


class Scratch:
    """Float32 memory for products, shared by all statistics of a pass through a layer: a mixture has many of one width.

    Memory that is taken once, not for every batch between those of the model, leaves no holes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._taken: dict[tuple[str, int, int], Tensor] = {}

    def take(self, use: str, rows: int, cols: int) -> Tensor:
        """[rows, cols] float32 of any content, the same memory for the same use and shape."""
        key = (use, rows, cols)
        if key not in self._taken:
            self._taken[key] = torch.empty(rows, cols, device=self.device)
        return self._taken[key]


class Statistics:
    """Statistics of linear layers that share an input X [cols, tokens]; weighted means over all tokens.

    Attributes:
        hessian: X Xᵀ [cols, cols] float32; until `finish`, bfloat16 inputs leave the part below the diagonal open.
        cross: Y Xᵀ [rows, cols] float32, for the outputs Y [rows, tokens] that are wanted; None if `rows` is 0.
    """

    def __init__(self, cols: int, scratch: Scratch, rows: int = 0):
        self.hessian = torch.zeros(cols, cols, device=scratch.device)
        self.cross = torch.zeros(rows, cols, device=scratch.device) if rows else None
        self.tokens = 0.0
        self._scratch = scratch
        self._half = False

    def add(
        self,
        inputs: Tensor,
        wanted: Tensor | None = None,
        *,
        token_weight: float = 1.0,
        token_scales: Tensor | None = None,
    ) -> None:
        """Take in inputs [tokens, cols] and, with a cross product, wanted outputs [tokens, rows].

        A token counts by `token_weight` and by the square of its entry in `token_scales` [tokens] (mean square 1).

        Sums are float32. On a CPU bfloat16 inputs are multiplied as they are, some thousand tokens at a time: the
        products are rounded, but several times as fast. On a GPU the products of 16-bit inputs are those of TF32, whose
        mantissa is no shorter than theirs: only what is scaled, or wanted, is rounded to it.
        """
        self._half = inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and bf16_is_faster(inputs.device)
        at_once = HALF_TOKENS_AT_ONCE if self._half else TOKENS_AT_ONCE
        with tf32(inputs.dtype != torch.float32):
            for start in range(0, len(inputs), at_once):
                part = inputs[start : start + at_once]
                scales = None if token_scales is None else token_scales[start : start + at_once, None]
                outputs = None if wanted is None else wanted[start : start + at_once]
                self._add_part(part, outputs, scales, token_weight)
        self.tokens += token_weight * len(inputs)

    def _add_part(self, part: Tensor, wanted: Tensor | None, scales: Tensor | None, token_weight: float) -> None:
        if self._half:
            part = part if scales is None else part * scales.to(part.dtype)
        else:
            memory = self._scratch.take("inputs", TOKENS_AT_ONCE, part.shape[1])[: len(part)]
            part = memory.copy_(part) if scales is None else torch.mul(part, scales, out=memory)
        self._add_square(part, token_weight)
        if wanted is None:
            return
        assert self.cross is not None
        outputs = (wanted if scales is None else wanted * scales.to(part.dtype)).to(part.dtype)
        if self._half:
            self.cross.add_(outputs.t() @ part, alpha=token_weight)
        else:
            self.cross.addmm_(outputs.t(), part, alpha=token_weight)

    def _add_square(self, part: Tensor, token_weight: float) -> None:
        cols = len(self.hessian)
        if self._half:
            for first in range(0, cols, COLUMNS_AT_ONCE):
                columns = slice(first, first + COLUMNS_AT_ONCE)
                self.hessian[columns, first:].add_(part[:, columns].t() @ part[:, first:], alpha=token_weight)
        elif part.device.type == "cpu":
            # NumPy sees that both factors are one array and computes half of the symmetric product (BLAS syrk).
            array, gram = part.numpy(), self._scratch.take("gram", cols, cols)
            np.matmul(array.T, array, out=gram.numpy())
            self.hessian.add_(gram, alpha=token_weight)
        else:
            self.hessian.addmm_(part.t(), part, alpha=token_weight)

    def reorder(self, order: Tensor) -> None:
        """Statistics of the inputs in another order; `order` [cols] says which input each place gets."""
        assert self.cross is None
        self.hessian = self.hessian[order][:, order]

    def finish(self, name: str) -> None:
        """Sum over all processes and divide by the tokens' weights.

        Raises:
            UserError: an activation was NaN or infinite; names the linear layer.
        """
        del self._scratch  # which would otherwise live as long as the statistics
        if self._half:  # the upper triangle is the computed one
            for first in range(0, len(self.hessian), COLUMNS_AT_ONCE):
                end = min(first + COLUMNS_AT_ONCE, len(self.hessian))
                square = self.hessian[first:end, first:end]
                square.copy_(square.triu() + square.triu(1).t())
                self.hessian[end:, first:end] = self.hessian[first:end, end:].t()
        sums = [self.hessian] + ([self.cross] if self.cross is not None else [])
        count = torch.tensor(self.tokens, device=self.hessian.device)
        if dist.is_initialized():
            for tensor in [*sums, count]:
                dist.all_reduce(tensor)
        for tensor in sums:
            tensor /= count if count > 0 else 1  # experts may have seen no token
            if not torch.isfinite(tensor).all():
                raise UserError(f"the input of {name} is NaN or infinite in calibration; try --dtype bf16 or fp32")

    @tf32(False)
    def subtract_outputs(self, weight: Tensor) -> None:
        """Turn Y Xᵀ, once finished, into (Y - W X) Xᵀ for a weight W [rows, cols]: what its outputs lack.

        From X Xᵀ, so that no pass over the tokens computes W X.
        """
        assert self.cross is not None
        self.cross.addmm_(weight.float(), self.hessian, alpha=-1)


def relative_scales(target: Tensor) -> Tensor:
    """By what to multiply the tokens [tokens] of a target stream [tokens, width], so that errors count relative to it.

    Whatever reads the residual stream normalizes it first, so an error matters in proportion to the token's norm. That
    of a sequence's first token is often a hundred times the others', which it would outweigh. Mean square 1.
    """
    squares = target.float().square().mean(-1).clamp(min=1e-30)
    weights = (squares.median() / squares).clamp(max=MAX_TOKEN_WEIGHT)
    return (weights / weights.mean()).sqrt()


@torch.no_grad()
def collect(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    hidden: list[Tensor],
    advance: bool = False,
    energies: dict[nn.Linear, Tensor] | None = None,
    writer: nn.Linear | None = None,
    sums: list[Tensor] | None = None,
) -> list[Statistics]:
    """Run hidden states through a decoder layer and return the statistics of the inputs of `groups`, padding left out.

    Args:
        hidden: the hidden states to run, `states.pruned` or `states.dense`.
        advance: replace them by the layer's outputs. Otherwise the layer is run only as far as needed.
        energies: linear layers, each with zeros [cols], to which the weighted sums of its inputs' squares are added, of
            every fourth token.
        writer: a linear layer whose output is added to the layer's input; `sums` then receives that sum per batch.
    """
    scratch = Scratch(states.device)
    found = [Statistics(next(iter(group.values())).in_features, scratch) for group in groups]

    def input_hook(statistics: Statistics, batch: int) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            statistics.add(*states.kept(batch, args[0]), token_weight=states.token_weights[batch])
            if len(groups) == 1 and not advance:
                raise Stop  # nothing after the only wanted input need be computed

        return add

    def energy_hook(batch: int, energy: Tensor) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            inputs = states.kept(batch, args[0])[0][::4].float()
            energy.add_(inputs.square().sum(0), alpha=states.token_weights[batch])

        return add

    def output_hook(batch: int) -> Callable:
        def add(module: nn.Module, args: tuple, output: Tensor) -> None:
            assert sums is not None
            states.store(hidden[batch].to(states.device, non_blocking=True) + output.view_as(sums[batch]), sums[batch])

        return add

    with states.converted_weights(layer):
        for batch in range(len(hidden)):
            handles = [
                next(iter(group.values())).register_forward_pre_hook(input_hook(statistics, batch))
                for group, statistics in zip(groups, found, strict=True)
            ]
            for linear, energy in (energies or {}).items():
                handles.append(linear.register_forward_pre_hook(energy_hook(batch, energy)))
            if writer is not None:
                handles.append(writer.register_forward_hook(output_hook(batch)))
            with suppress(Stop):
                output = states.run(layer, index, batch, hidden[batch])
                if advance:
                    states.store(output, hidden[batch])
            for handle in handles:
                handle.remove()
    for group, statistics in zip(groups, found, strict=True):
        statistics.finish(next(iter(group)))
    if dist.is_initialized():
        for energy in (energies or {}).values():
            dist.all_reduce(energy)
    return found


@dataclass
class Writers:
    """The groups of a decoder layer that are one linear layer whose output is simply added to the residual stream."""

    inner: int | None = None  # number of the group that is added to the layer's input (in a Llama, o_proj)
    last: int | None = None  # number of the last group, if the layer's output is the sum so far plus its output
    parent: str | None = None  # the module within the layer (in a Llama, self_attn) that returns what inner returns
    returned: int = 0  # how many values it returns, all but the first None; 0 if only a tensor


@torch.no_grad()
def stream_writers(states: HiddenStates, layer: nn.Module, index: int, groups: list[dict[str, nn.Linear]]) -> Writers:
    """Find the linear layers that write to the residual stream.

    They are tested on the first sequence of the dense model's hidden states: without the last linear the layer must
    return its input plus what the inner one adds; the last must add the rest. Models that normalize such outputs first
    (Gemma) have none.
    """
    assert states.dense is not None
    writers, last = Writers(), len(groups) - 1
    if len(groups) > MAX_SEQUENTIAL_GROUPS or not groups or len(groups[last]) != 1:
        return writers
    outputs: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        outputs[module] = output

    names = {module: name for name, module in layer.named_modules()}
    linears = {number: next(iter(group.values())) for number, group in enumerate(groups) if len(group) == 1}
    parents = {number: layer.get_submodule(names[linear].rpartition(".")[0]) for number, linear in linears.items()}
    handles = [module.register_forward_hook(note) for module in {*linears.values(), *parents.values()}]
    hidden = states.dense[0][:1]
    with states.converted_weights(layer):
        whole = states.run(layer, index, 0, hidden)
        found = dict(outputs)
        with _zero_output(states, linears[last]):
            residual = states.run(layer, index, 0, hidden)
    for handle in handles:
        handle.remove()
    if linears[last] not in found or not _adds_up(whole - residual, found[linears[last]]):
        return writers
    writers.last = last
    added = residual - hidden.to(states.device)
    for number, linear in linears.items():
        if number != last and linear in found and _adds_up(added, found[linear]):
            writers.inner = number
            values = found.get(parents[number])
            first, *others = values if isinstance(values, tuple) else (values,)
            if parents[number] is not layer and first is found[linear] and all(value is None for value in others):
                writers.parent = names[parents[number]]
                writers.returned = len(values) if isinstance(values, tuple) else 0
    return writers


@contextmanager
def _zero_output(states: HiddenStates, linear: nn.Linear) -> Iterator[list[Tensor]]:
    """Within the block the linear returns zeros; the list that is yielded holds its latest input."""
    dtype = torch.bfloat16 if states.autocast else linear.weight.dtype
    seen: list[Tensor] = []

    def zeros(inputs: Tensor) -> Tensor:
        seen[:] = [inputs]
        return inputs.new_zeros(*inputs.shape[:-1], linear.out_features, dtype=dtype)

    with replaced_forward([linear], lambda index: zeros):
        yield seen


@torch.no_grad()
def collect_missing(
    states: HiddenStates, layer: nn.Module, index: int, name: str, linear: nn.Linear, sums: list[Tensor]
) -> Statistics:
    """Statistics of a linear whose output is added to the layer's input, and of what the sum lacks.

    Args:
        sums: input plus output of the dense model, for each batch, from `collect`. Afterwards they hold the linear's
            inputs in the pruned model, if these are as wide.

    Returns:
        Statistics with `cross`, for what W X lacks: Y - W X with Y = sum - pruned model's hidden states.
    """
    assert states.pruned is not None
    found = Statistics(linear.in_features, Scratch(states.device), linear.out_features)

    def hook(batch: int, hidden: Tensor) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            target = sums[batch].to(states.device, non_blocking=True)
            wanted = (target - hidden.to(states.device, non_blocking=True)).float()
            add_wanted(found, states, batch, linear, args[0], wanted, target)
            if linear.in_features == linear.out_features:
                states.store(args[0].view_as(sums[batch]), sums[batch])
            raise Stop

        return add

    with states.converted_weights(layer):
        for batch, hidden in enumerate(states.pruned):
            handle = linear.register_forward_pre_hook(hook(batch, hidden))
            with suppress(Stop):
                states.run(layer, index, batch, hidden)
            handle.remove()
    found.finish(name)
    found.subtract_outputs(linear.weight)
    return found


def add_wanted(
    found: Statistics,
    states: HiddenStates,
    batch: int,
    linear: nn.Linear,
    inputs: Tensor,
    wanted: Tensor,
    target: Tensor,
) -> None:
    """Take the outputs that are wanted of a linear, for its inputs in one batch, into its statistics.

    Args:
        inputs: [batch, length, cols] or [tokens, cols].
        wanted, target: [batch, length, width], outputs of the linear and the residual stream that they lead to.
    """
    if linear.bias is not None:
        wanted = wanted - linear.bias
    inputs, wanted, target = states.kept(batch, inputs, wanted, target)
    weight = states.token_weights[batch]
    found.add(inputs, wanted, token_weight=weight, token_scales=relative_scales(target))


@torch.no_grad()
def collect_residual(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    name: str,
    linear: nn.Linear,
    inputs_of_last: list[Tensor],
    outputs_of_parent: Callable[[int], Callable] | None = None,
    parent: nn.Module | None = None,
) -> Statistics:
    """Statistics of the layer's last linear, and of all that the layer's output lacks so far.

    The linear's output is added to the residual stream R. The layer's target T (the dense model's hidden states,
    `states.dense`, already moved past the layer) lacks T - R - W X. Fitting it is the asymmetric calibration of GPTAQ
    (Li et al. 2025), with the residual's own error included.

    Args:
        inputs_of_last: buffers that receive X per batch.
        outputs_of_parent: from a batch's number to the forward function of `parent`, a module whose output is known.

    Returns:
        Statistics with `cross`. `states.pruned` then holds R.
    """
    assert states.pruned is not None and states.dense is not None  # an asymmetric recipe asks for both
    found = Statistics(linear.in_features, Scratch(states.device), linear.out_features)
    with states.converted_weights(layer):
        for batch, hidden in enumerate(states.pruned):
            known: AbstractContextManager = nullcontext()
            if parent is not None and outputs_of_parent is not None:
                forward = outputs_of_parent(batch)
                known = replaced_forward([parent], lambda index, forward=forward: forward)  # type: ignore[misc]
            with known, _zero_output(states, linear) as seen:
                residual = states.run(layer, index, batch, hidden)
            target = states.dense[batch].to(states.device, non_blocking=True)
            states.store(residual, hidden)
            add_wanted(found, states, batch, linear, seen[0], target.float() - residual.float(), target)
            states.store(seen[0].reshape(inputs_of_last[batch].shape), inputs_of_last[batch])
    found.finish(name)
    found.subtract_outputs(linear.weight)
    return found


def _adds_up(added: Tensor, output: Tensor) -> bool:
    """Whether what a linear adds to its layer's output is its own output, but for rounding."""
    if output.numel() != added.numel() or output.shape[-1] != added.shape[-1]:
        return False
    return bool((added - output.view_as(added)).float().norm() <= 0.05 * added.float().norm())


@torch.no_grad()
def add_output(states: HiddenStates, linear: nn.Linear, inputs: list[Tensor]) -> None:
    """Turn the residuals R in `states.pruned` into R + W X, bit for bit what the layer itself returns."""
    assert states.pruned is not None
    with states.converted_weights(linear):
        for hidden, given in zip(states.pruned, inputs, strict=True):
            output = states.linear(linear, given.to(states.device, non_blocking=True))
            states.store(hidden.to(states.device, non_blocking=True) + output.view_as(hidden), hidden)
