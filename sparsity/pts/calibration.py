"""Calibration statistics of linear layers: second moments of their inputs, and products with wanted outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsity.devices import tf32
from sparsity.errors import UserError
from sparsity.pts.activations import HiddenStates
from sparsity.pts.discovery import Stop, replaced_forward

TOKENS_AT_ONCE = 1024  # converted to float32 at a time: enough for full speed, little memory


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
    """Statistics of linear layers that share an input X [cols, tokens]; means over all tokens.

    Attributes:
        hessian: X Xᵀ [cols, cols] float32.
        cross: Y Xᵀ [rows, cols] float32, for a wanted output Y [rows, tokens]; None if `rows` is 0.
    """

    def __init__(self, cols: int, scratch: Scratch, rows: int = 0):
        self.hessian = torch.zeros(cols, cols, device=scratch.device)
        self.cross = torch.zeros(rows, cols, device=scratch.device) if rows else None
        self.tokens = 0
        self._scratch = scratch

    @tf32(False)
    def add(self, inputs: Tensor, wanted: Tensor | None = None) -> None:
        """Take in inputs [tokens, cols] and, with a cross product, wanted outputs [tokens, rows]."""
        cols = len(self.hessian)
        for start in range(0, len(inputs), TOKENS_AT_ONCE):
            given = inputs[start : start + TOKENS_AT_ONCE]
            part = self._scratch.take("inputs", TOKENS_AT_ONCE, cols)[: len(given)].copy_(given)
            if part.device.type == "cpu":
                # NumPy sees that both factors are one array and computes half of the symmetric product (BLAS syrk).
                array, gram = part.numpy(), self._scratch.take("gram", cols, cols)
                np.matmul(array.T, array, out=gram.numpy())
                self.hessian += gram
            else:
                self.hessian.addmm_(part.t(), part)
            if wanted is not None:
                assert self.cross is not None
                self.cross.addmm_(wanted[start : start + TOKENS_AT_ONCE].float().t(), part)
        self.tokens += len(inputs)

    def finish(self, name: str) -> None:
        """Sum over all processes and divide by the tokens.

        Raises:
            UserError: an activation was NaN or infinite; names the linear layer.
        """
        del self._scratch  # which would otherwise live as long as the statistics
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
def collect(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    hidden: list[Tensor],
    advance: bool = False,
) -> list[Statistics]:
    """Run hidden states through a decoder layer and return the statistics of the inputs of `groups`, padding left out.

    Args:
        hidden: the hidden states to run, `states.pruned` or `states.dense`.
        advance: replace them by the layer's outputs. Otherwise the layer is run only as far as needed.
    """
    scratch = Scratch(states.device)
    found = [Statistics(next(iter(group.values())).in_features, scratch) for group in groups]

    def hook(statistics: Statistics, keep: Tensor | None) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            inputs = args[0].flatten(0, -2)
            statistics.add(inputs[keep] if keep is not None and len(keep) == len(inputs) else inputs)
            if len(groups) == 1 and not advance:
                raise Stop  # nothing after the only wanted input need be computed

        return add

    for batch, keep in enumerate(states.keep):
        handles = [
            next(iter(group.values())).register_forward_pre_hook(hook(statistics, keep))
            for group, statistics in zip(groups, found, strict=True)
        ]
        with suppress(Stop):
            output = states.run(layer, index, batch, hidden[batch])
            if advance:
                states.store(output, hidden[batch])
        for handle in handles:
            handle.remove()
    for group, statistics in zip(groups, found, strict=True):
        statistics.finish(next(iter(group)))
    return found


@torch.no_grad()
def collect_residual(
    states: HiddenStates, layer: nn.Module, index: int, name: str, linear: nn.Linear
) -> tuple[Statistics, list[Tensor]] | None:
    """Statistics of the layer's last linear, whose wanted output makes up for all that the layer's output has lost.

    Where the linear's output is added to the residual stream R, the output Y that brings the layer to its target T (the
    dense model's hidden states, `states.dense`, already moved past the layer) is T - R. Fitting W X to Y instead of to
    the dense W X is the asymmetric calibration of GPTAQ (Li et al. 2025), with the residual's own error included.

    Returns:
        (Statistics with `cross`, X per batch), and `states.pruned` then holds R; or None, with `states.pruned`
        unchanged, where the linear's output is not simply added to the layer's (Gemma normalizes it first) or the
        linear did not run.
    """
    assert states.pruned is not None and states.dense is not None  # an asymmetric recipe asks for both
    rows, cols = linear.weight.shape
    found = Statistics(cols, Scratch(states.device), rows)
    dtype = torch.bfloat16 if states.autocast else linear.weight.dtype
    seen: list[Tensor] = []
    inputs_of_last: list[Tensor] = []

    def zero_output(inputs: Tensor) -> Tensor:
        seen[:] = [inputs]
        return inputs.new_zeros(*inputs.shape[:-1], rows, dtype=dtype)

    for batch, keep in enumerate(states.keep):
        with replaced_forward([linear], lambda index: zero_output):
            residual = states.run(layer, index, batch, states.pruned[batch])
        if batch == 0:
            if not seen or not _adds_up(
                states.run(layer, index, 0, states.pruned[0]) - residual, states.linear(linear, seen[0])
            ):
                return None
            shapes = [torch.Size((*hidden.shape[:-1], cols)) for hidden in states.pruned]
            inputs_of_last = states.allocate(shapes, seen[0].dtype)
        states.store(seen[0].reshape(inputs_of_last[batch].shape), inputs_of_last[batch])
        wanted = states.dense[batch].to(states.device, non_blocking=True).float() - residual.float()
        if linear.bias is not None:
            wanted -= linear.bias.float()
        states.store(residual, states.pruned[batch])
        inputs, wanted = seen[0].flatten(0, -2), wanted.flatten(0, -2)
        found.add(*(t if keep is None else t[keep] for t in (inputs, wanted)))
    found.finish(name)
    return found, inputs_of_last


def _adds_up(added: Tensor, output: Tensor) -> bool:
    """Whether what a linear adds to its layer's output is its own output, but for rounding."""
    if output.numel() != added.numel() or output.shape[-1] != added.shape[-1]:
        return False
    return bool((added - output.view_as(added)).float().norm() <= 0.05 * added.float().norm())


@torch.no_grad()
def add_output(states: HiddenStates, linear: nn.Linear, inputs: list[Tensor]) -> None:
    """Turn the residuals R in `states.pruned` into R + W X, bit for bit what the layer itself returns."""
    assert states.pruned is not None
    for hidden, given in zip(states.pruned, inputs, strict=True):
        output = states.linear(linear, given.to(states.device, non_blocking=True))
        states.store(hidden.to(states.device, non_blocking=True) + output.view_as(hidden), hidden)
