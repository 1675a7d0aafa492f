"""Calibration statistics of linear layers: second moments of their inputs, and products with the outputs to fit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster, tf32
from sparsity.errors import UserError
from sparsity.pts.activations import PROBE, HiddenStates
from sparsity.pts.structure import DecoderLayer, Group, reader, replaced_forward, watched

TOKENS_AT_ONCE = 2048  # copied to float32 and multiplied at a time: enough for full speed, little memory
HESSIAN_BLOCKS = 8  # of columns: half of a symmetric product needs no computing, 7 of 16 parts are left out
ENERGY_STRIDE = 4  # between the tokens from which the energy of each input is taken
MAX_TOKEN_WEIGHT = 10.0  # before weights are brought to a mean of 1: of a token whose target is nearly zero

MAX_SEQUENTIAL_GROUPS = 8  # decoder layers have about four; a mixture of experts has many


class Statistics:
    """Statistics of linear layers that share an input X [cols, tokens]; weighted means over all tokens.

    Attributes:
        hessian: X Xᵀ [cols, cols] float32; only the upper triangle until `finish`.
        cross: Y Xᵀ [rows, cols] float32 for the target outputs Y [rows, tokens]; None if `rows` is 0. After `finish`
            (Y - W X) Xᵀ, for what the outputs W X lack.
    """

    def __init__(self, cols: int, device: torch.device, rows: int = 0):
        self.hessian = torch.zeros(cols, cols, device=device)
        self.cross = torch.zeros(rows, cols, device=device) if rows else None
        self.tokens = 0.0

    def add(
        self,
        inputs: Tensor,
        target: Tensor | None = None,
        *,
        token_weight: float = 1.0,
        token_scales: Tensor | None = None,
    ) -> None:
        """Add inputs [tokens, cols] and, for a cross product, target outputs [tokens, rows].

        A token counts by `token_weight` and by the square of its entry in `token_scales` [tokens] (mean square 1).

        Sums are float32. CPUs with bf16 instructions multiply bf16 inputs as they are: the products are rounded, but
        several times as fast. On a GPU the products of 16-bit inputs are those of TF32, whose mantissa is no shorter.
        """
        in_bf16 = inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and bf16_is_faster(inputs.device)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        size = -(-len(self.hessian) // HESSIAN_BLOCKS)
        with tf32(inputs.dtype != torch.float32):
            for start in range(0, len(inputs), TOKENS_AT_ONCE):
                tokens = slice(start, start + TOKENS_AT_ONCE)
                scales = None if token_scales is None else token_scales[tokens, None]
                part = (inputs[tokens] if scales is None else inputs[tokens] * scales).to(dtype)
                for first in range(0, len(self.hessian), size):
                    rows = slice(first, first + size)
                    self.hessian[rows, first:].add_(part[:, rows].t() @ part[:, first:], alpha=token_weight)
                if target is not None and self.cross is not None:
                    goal = (target[tokens] if scales is None else target[tokens] * scales).to(dtype)
                    self.cross.add_(goal.t() @ part, alpha=token_weight)
        self.tokens += token_weight * len(inputs)

    @tf32(False)
    def finish(self, name: str, weight: Tensor) -> None:
        """Sum over all processes and divide by the tokens' weights.

        Args:
            name: of the linear layer.  weight: its W [rows, cols], whose outputs are subtracted from the targets.

        Raises:
            UserError: an activation was NaN or infinite; names the linear layer.
        """
        sums = [self.hessian] + ([self.cross] if self.cross is not None else [])
        count = torch.tensor(self.tokens, device=self.hessian.device)
        if dist.is_initialized():
            for tensor in [*sums, count]:
                dist.all_reduce(tensor)
        for tensor in sums:
            tensor /= count if count > 0 else 1  # experts may have seen no token
            if not torch.isfinite(tensor).all():
                raise UserError(f"the input of {name} is NaN or infinite in calibration; try --dtype bf16 or fp32")
        self.tokens = count.item()
        self.hessian.triu_()
        self.hessian += self.hessian.triu(1).t()
        if self.cross is not None:  # from X Xᵀ, so that no pass over the tokens computes W X
            self.cross.addmm_(weight.float(), self.hessian, alpha=-1)


def fill_up(statistics: list[Statistics]) -> None:
    """Give experts that saw fewer tokens than they have inputs the mean statistics of all for the missing ones."""
    width = len(statistics[0].hessian)
    total = sum(each.tokens for each in statistics)
    few = [each for each in statistics if each.tokens < width]
    if not few or not total:
        return
    mean = torch.zeros_like(statistics[0].hessian)
    for each in statistics:
        mean.add_(each.hessian, alpha=each.tokens / total)
    for each in few:
        part = each.tokens / width
        each.hessian.mul_(part).add_(mean, alpha=1 - part)


def relative_scales(target: Tensor) -> Tensor:
    """Scales [tokens], mean square 1, that make errors in a target stream [tokens, width] relative to its norm.

    Whatever reads the residual stream normalizes it first, so an error matters in proportion to the token's norm. That
    of a sequence's first token is often a hundred times the others', which it would outweigh.
    """
    squares = target.float().square().mean(-1).clamp(min=1e-30)
    weights = (squares.median() / squares).clamp(max=MAX_TOKEN_WEIGHT)
    return (weights / weights.mean()).sqrt()


@dataclass
class Targets:
    """The residual stream that a linear layer should leave behind, which is the dense model's.

    Attributes:
        stream: [batch, length, width] for each batch.
        inputs: buffers for the inputs of the layer's last linear; None for a linear in its middle, whose output is
            added to the layer's own input.
    """

    stream: list[Tensor]
    inputs: list[Tensor] | None = None


@torch.no_grad()
def collect(
    states: HiddenStates,
    layer: DecoderLayer,
    groups: list[Group],
    hidden: list[Tensor],
    *,
    advance: bool = False,
    targets: Targets | None = None,
    stream: tuple[nn.Linear, list[Tensor]] | None = None,
    energies: Mapping[nn.Linear, Tensor] | None = None,
) -> list[Statistics]:
    """Run hidden states through a decoder layer and collect the statistics of the inputs of `groups`.

    Args:
        hidden: the hidden states to run, `states.pruned` or `states.dense`.
        advance: replace them by the layer's outputs. Otherwise the layer is run only as far as needed.
        targets: for `groups` of a single linear: what the residual stream should be behind it. Fitting it is the
            asymmetric calibration of GPTAQ (Li et al. 2025), with the residual's own error included. With
            `targets.inputs`, `hidden` receives the stream without the linear's output.
        stream: a linear layer whose output is added to the layer's input, and buffers for that sum.
        energies: linear layers, each with zeros [cols] that receive the weighted sums of the squares of its inputs.

    Raises:
        UserError: an activation was NaN or infinite.
    """
    linears = [reader(group) for group in groups]
    rows = linears[0].out_features if targets else 0
    collected = [Statistics(linear.in_features, states.device, rows) for linear in linears]
    at_end = targets is not None and targets.inputs is not None
    energies = energies or {}
    modules = {*linears, *energies, *((stream[0],) if stream else ())}
    with states.precision(), zero_output(linears[0], states.linear_dtype) if targets else nullcontext():
        for batch, buffer in enumerate(hidden):
            with watched(modules, stop=not (advance or at_end)) as calls:
                output = states.run(layer, batch, buffer)
            weight, outputs, scales = states.token_weights[batch], None, None
            if targets is not None:
                target, without = states.load(targets.stream[batch]), output if at_end else states.load(buffer)
                bias = 0.0 if linears[0].bias is None else linears[0].bias
                outputs = (target.float() - without.float() - bias).flatten(0, -2)
                scales = relative_scales(target.flatten(0, -2))
            for linear, statistics in zip(linears, collected, strict=True):
                for inputs, _ in calls.get(linear, ()):
                    flat = inputs.flatten(0, -2).to(states.linear_dtype)
                    statistics.add(flat, outputs, token_weight=weight, token_scales=scales)
            for linear, energy in energies.items():
                for inputs, _ in calls.get(linear, ()):  # a sample of the tokens is enough
                    energy.add_(inputs.flatten(0, -2)[::ENERGY_STRIDE].float().square().sum(0), alpha=weight)
            if stream is not None:
                added = calls[stream[0]][0][1]
                states.store(states.load(buffer) + added.view_as(buffer), stream[1][batch])
            if targets is not None and targets.inputs is not None:
                states.store(calls[linears[0]][0][0], targets.inputs[batch])
            if advance or at_end:
                states.store(output, buffer)
    if dist.is_initialized():
        for energy in energies.values():
            dist.all_reduce(energy)
    for group, linear, statistics in zip(groups, linears, collected, strict=True):
        statistics.finish(next(iter(group)), linear.weight)
    return collected


def zero_output(linear: nn.Linear, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A block in which the linear returns zeros of this dtype, without computing anything."""

    def zeros(inputs: Tensor) -> Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], linear.out_features, dtype=dtype)

    return replaced_forward([linear], lambda index: zeros)


@torch.no_grad()
def stream_linears(states: HiddenStates, layer: DecoderLayer) -> tuple[int | None, int | None]:
    """Find the linear layers whose output is simply added to the residual stream.

    They are tested on a few of the dense model's hidden states: without the last linear, the layer must
    return the rest, which is its input plus the output of the inner one. Models that normalize such outputs first
    (Gemma) have none; where experts come last, there is only an inner one.

    Returns:
        number of the group that is added to the layer's input (o_proj in a Llama), and number of the last group
        (down_proj); None where there is no such layer.
    """
    last = len(layer.groups) - 1
    if not 0 <= last < MAX_SEQUENTIAL_GROUPS or len(layer.groups[last]) != 1:
        return None, None
    single = {number: reader(group) for number, group in enumerate(layer.groups) if len(group) == 1}
    experts = [linear for linears in layer.experts.linears.values() for linear in linears] if layer.experts else []
    hidden = states.probe()

    def without(number: int, stream: Tensor) -> Tensor:
        with zero_output(single[number], states.linear_dtype):
            return states.run(layer, PROBE, stream)

    with states.precision():
        with watched([*single.values(), *experts]) as calls:
            whole = states.run(layer, PROBE, hidden)
        outputs = {number: calls[linear][0][1] for number, linear in single.items() if linear in calls}
        order = list(calls)
        ends = last in outputs and not any(expert in order[order.index(single[last]) :] for expert in experts)
        rest = without(last, hidden) if ends else whole
        at_end = last if ends and _is_sum(whole - rest, outputs[last]) else None
        for number, output in outputs.items():
            if number == at_end or output.numel() != hidden.numel():
                continue
            added = rest - states.load(hidden)
            if at_end is None:  # unknown what follows: it must return the same for the input with the output added
                stream = states.load(hidden).to(states.dtype) + output.view_as(hidden)
                added = output + (without(number, stream) - whole).view_as(output)
            if _is_sum(added, output):
                return number, at_end
    return None, at_end


def _is_sum(added: Tensor, output: Tensor) -> bool:
    """Whether the addition to the stream is the linear's output but for rounding."""
    if output.numel() != added.numel() or output.shape[-1] != added.shape[-1]:
        return False
    return bool((added - output.view_as(added)).float().norm() <= 0.05 * added.float().norm())


@torch.no_grad()
def add_output(states: HiddenStates, linear: nn.Linear, targets: Targets) -> None:
    """Add the output of the layer's last linear to `states.pruned`, bit for bit as the layer itself does.

    `collect` has left the stream without it there, and its inputs in `targets`.
    """
    assert states.pruned is not None and targets.inputs is not None
    with states.precision():
        for hidden, inputs in zip(states.pruned, targets.inputs, strict=True):
            output = linear(states.load(inputs))
            states.store(states.load(hidden) + output.view_as(hidden), hidden)
