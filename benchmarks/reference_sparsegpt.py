"""SparseGPT as Frantar & Alistarh (2023) describe it, in plain code: the baseline of pruning.py.

One forward pass per decoder layer collects the Hessians of all its linear layers, each of which is then pruned with
Algorithm 1 (percdamp 0.01, blocks of 128 columns, 2:4 by w² / U_jj²). A second pass computes the inputs of the next
layer.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_weight(weight: Tensor, hessian: Tensor, percdamp: float = 0.01, block_size: int = 128) -> Tensor:
    """Algorithm 1 for 2:4 on one weight.

    Args:
        weight: [rows, cols].
        hessian: [cols, cols] float32.
        percdamp: damping, as a share of the Hessian's mean diagonal.
        block_size: columns that are updated at once.

    Returns:
        the pruned weight [rows, cols], float32.
    """
    weight, hessian = weight.float().clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if j % 4 == 0:
                scores = (weight[:, j : j + 4] / factor.diagonal()[j : j + 4]) ** 2
                pruned = scores.topk(2, dim=1, largest=False).indices
                drop = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, pruned, True)
            kept = weight[:, j].masked_fill(drop[:, j % 4], 0.0)
            error = (weight[:, j] - kept) / factor[j, j]
            weight[:, j:end] -= error[:, None] * factor[j, j:end]
            weight[:, j] = kept
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


@torch.no_grad()
def prune_llama(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """Prune every decoder layer of a Llama-type model in place.

    Args:
        model: on the CPU, in eval mode.
        batches: calibration tokens, int64 tensors [batch, length] of one length.
    """
    hidden: list[Tensor] = []
    layer_kwargs: dict[str, Any] = {}

    class StopForward(Exception):
        pass

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        layer_kwargs.update(kwargs)
        raise StopForward

    handle = model.model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(StopForward):
            model(batch, use_cache=False)
    handle.remove()
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        hessians = {linear: torch.zeros(linear.in_features, linear.in_features) for linear in linears}

        def add(linear: nn.Linear, args: tuple, hessians: dict[nn.Linear, Tensor] = hessians) -> None:
            inputs = args[0].flatten(0, 1).float()
            hessians[linear] += inputs.t() @ inputs

        handles = [linear.register_forward_pre_hook(add) for linear in linears]
        for states in hidden:
            layer(states, **layer_kwargs)
        for handle in handles:
            handle.remove()
        for linear in linears:
            linear.weight.copy_(prune_weight(linear.weight, hessians[linear]))
        for index, states in enumerate(hidden):
            output = layer(states, **layer_kwargs)
            hidden[index] = output[0] if isinstance(output, tuple) else output
