"""What calibration tells about linear layers: second moments of their inputs, and the outputs that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decoder import Stop, Stream
from utils import UserError


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
            assert self.cross is not None
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
    found = []
    for group in groups:
        width = next(iter(group.values())).in_features
        found.append(Statistics(torch.zeros(width, width, device=stream.device)))

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
                advance[batch] = stream.store(stream.run(layer, index, batch, advance[batch]))
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
    found = Statistics(torch.zeros(cols, cols, device=stream.device), torch.zeros(rows, cols, device=stream.device))
    seen: list[Tensor] = []
    kept_inputs: list[Tensor] = []

    def silence(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen[:] = [args[0], output]
        return torch.zeros_like(output)

    for batch, keep in enumerate(stream.keep):
        handle = linear.register_forward_hook(silence)
        residual = stream.run(layer, index, batch)
        handle.remove()
        if batch == 0:
            if not seen or seen[1].numel() != residual.numel() or seen[1].shape[-1] != residual.shape[-1]:
                return None
            added = stream.run(layer, index, batch) - residual
            if (added - seen[1].view_as(added)).float().norm() > 0.05 * added.float().norm():
                return None
        stream.hidden[batch] = stream.store(residual)
        kept_inputs.append(stream.store(seen[0]))
        wanted = targets[batch].to(stream.device, non_blocking=True).float() - residual.float()
        if linear.bias is not None:
            wanted -= linear.bias.float()
        inputs, wanted = seen[0].flatten(0, -2), wanted.flatten(0, -2)
        found.add(*(t if keep is None else t[keep] for t in (inputs, wanted)))
    found.finish(name)
    return found, kept_inputs


@torch.no_grad()
def add_output(stream: Stream, linear: nn.Linear, inputs: list[Tensor]) -> None:
    """Bring a stream of residuals to the layer's output: R + W X, to the bit what the layer itself would give."""
    for batch, (hidden, given) in enumerate(zip(stream.hidden, inputs, strict=True)):
        with stream.precision():
            output = linear(given.to(stream.device, non_blocking=True))
        stream.hidden[batch] = stream.store(hidden.to(stream.device, non_blocking=True) + output.view_as(hidden))
