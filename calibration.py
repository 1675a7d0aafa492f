"""What calibration tells about linear layers: second moments of their inputs, and the outputs that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from decoder import Stop, Stream, replaced_forward
from utils import UserError

TOKENS_AT_ONCE = 1024  # in float32 beside what the model computed: enough for full speed, little memory


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
    """What calibration tells about linear layers that share an input X [cols, tokens]; means over all tokens.

    Attributes:
        hessian: X Xᵀ [cols, cols] float32.
        cross: Y Xᵀ [rows, cols] float32, for a wanted output Y [rows, tokens]; None if `rows` is 0.
    """

    def __init__(self, cols: int, scratch: Scratch, rows: int = 0):
        self.hessian = torch.zeros(cols, cols, device=scratch.device)
        self.cross = torch.zeros(rows, cols, device=scratch.device) if rows else None
        self.tokens = 0
        self._scratch = scratch

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
    stream: Stream,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    advance: list[Tensor] | None = None,
) -> list[Statistics]:
    """Run hidden states through the layer to see the inputs of `groups`; padding is left out.

    Without `advance` the stream's are run, and only as far as needed. With it, that list of hidden states (one per
    batch) is run and replaced by the layer's outputs.
    """
    scratch = Scratch(stream.device)
    found = [Statistics(next(iter(group.values())).in_features, scratch) for group in groups]

    def hook(statistics: Statistics, keep: Tensor | None) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            inputs = args[0].flatten(0, -2)
            statistics.add(inputs[keep] if keep is not None and len(keep) == len(inputs) else inputs)
            if len(groups) == 1 and advance is None:
                raise Stop  # what lies behind the only wanted input need not be computed

        return add

    for batch, keep in enumerate(stream.keep):
        handles = [
            next(iter(group.values())).register_forward_pre_hook(hook(statistics, keep))
            for group, statistics in zip(groups, found, strict=True)
        ]
        with suppress(Stop):
            if advance is None:
                stream.run(layer, index, batch)
            else:
                stream.put(stream.run(layer, index, batch, advance[batch]), advance[batch])
        for handle in handles:
            handle.remove()
    for group, statistics in zip(groups, found, strict=True):
        statistics.finish(next(iter(group)))
    return found


@torch.no_grad()
def collect_residual(
    stream: Stream, layer: nn.Module, index: int, name: str, linear: nn.Linear, targets: list[Tensor]
) -> tuple[Statistics, list[Tensor]] | None:
    """Statistics of the layer's last linear, wanting it to make up for all that the layer's output has lost so far.

    Where the linear's output is added to the residual stream R, the output Y that would bring the layer to its target T
    (the dense model's hidden states) is T - R. Fitting W X to Y instead of to the dense W X is the asymmetric
    calibration of GPTAQ (Li et al. 2025), with the residual's own error in it.

    Returns:
        (Statistics with `cross`, X per batch), and the stream then holds R; or None, and the stream is as it was, where
        the linear's output does not simply add to the layer's (Gemma's normalizes it first) or was not seen.
    """
    rows, cols = linear.weight.shape
    found = Statistics(cols, Scratch(stream.device), rows)
    dtype = torch.bfloat16 if stream.autocast else linear.weight.dtype
    seen: list[Tensor] = []
    kept_inputs: list[Tensor] = []

    def silent(inputs: Tensor) -> Tensor:
        seen[:] = [inputs]
        return inputs.new_zeros(*inputs.shape[:-1], rows, dtype=dtype)

    for batch, keep in enumerate(stream.keep):
        with replaced_forward([linear], lambda index: silent):
            residual = stream.run(layer, index, batch)
        if batch == 0:
            if not seen or not _adds_up(stream.run(layer, index, 0) - residual, stream.linear(linear, seen[0])):
                return None
            shapes = [torch.Size((*hidden.shape[:-1], cols)) for hidden in stream.hidden]
            kept_inputs = stream.allocate(shapes, seen[0].dtype)
        stream.put(seen[0].reshape(kept_inputs[batch].shape), kept_inputs[batch])
        wanted = targets[batch].to(stream.device, non_blocking=True).float() - residual.float()
        if linear.bias is not None:
            wanted -= linear.bias.float()
        stream.put(residual, stream.hidden[batch])
        inputs, wanted = seen[0].flatten(0, -2), wanted.flatten(0, -2)
        found.add(*(t if keep is None else t[keep] for t in (inputs, wanted)))
    found.finish(name)
    return found, kept_inputs


def _adds_up(added: Tensor, output: Tensor) -> bool:
    """Whether what a linear adds to its layer's output is its own output, but for rounding."""
    if output.numel() != added.numel() or output.shape[-1] != added.shape[-1]:
        return False
    return bool((added - output.view_as(added)).float().norm() <= 0.05 * added.float().norm())


@torch.no_grad()
def add_output(stream: Stream, linear: nn.Linear, inputs: list[Tensor]) -> None:
    """Bring a stream of residuals to the layer's output: R + W X, to the bit what the layer itself would give."""
    for hidden, given in zip(stream.hidden, inputs, strict=True):
        output = stream.linear(linear, given.to(stream.device, non_blocking=True))
        stream.put(hidden.to(stream.device, non_blocking=True) + output.view_as(hidden), hidden)
