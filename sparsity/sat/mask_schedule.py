"""Masks that move in the first part of training, and are then frozen.

While masks move, every weight is trained: layers compute with the weights that are kept, and the gradient of the weight
that a layer computes with is taken for the pruned ones as well (straight-through). Pruned weights begin at zero, are
held aside from step to step, and shrink outside the optimizer's momentum, as in AST (Huang et al. 2025, "Pruning Large
Language Models with Semi-Structural Adaptive Sparse Training", section 3.2). Every few steps each group of four keeps
the two weights that count most, by their square or by the square times the optimizer's second moment, an estimate of
what the loss would lose (the projection of ELSA, Lee et al. 2025). Once masks are frozen, training is the usual one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsity.errors import UserError
from sparsity.sat.sharding import local, local_flat_ranges, masked_weights

GROUP, KEPT = 4, 2  # the pattern 2:4


def strongest(scores: torch.Tensor) -> torch.Tensor:
    """Bool mask that keeps the two highest of every four scores in a row; scores [rows, columns].

    >>> strongest(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).int()
    tensor([[0, 1, 1, 0]], dtype=torch.int32)
    """
    groups = scores.unflatten(-1, (-1, GROUP))
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(-1, groups.topk(KEPT, dim=-1).indices, True).flatten(-2)


@dataclass
class MaskSchedule:
    """When and how masks move.

    Attributes:
        score: "magnitude" or "saliency"; see above.
        every: optimizer steps between two choices of masks.
        until: share of all steps after which masks are frozen.
        decay: pruned weights shrink by the learning rate times this in every step.
        pruned: values of the pruned weights by name, each with zeros where a weight is kept; this process's shards.
    """

    score: str
    every: int
    until: float
    decay: float
    pruned: dict[str, torch.Tensor] = field(default_factory=dict)
    moving: bool = False

    def last_step(self, steps: int) -> int:
        """The step after which masks are frozen, of `steps` in all."""
        return max(1, int(self.until * steps))

    @torch.no_grad()
    def begin(self, model: nn.Module, step: int, steps: int) -> None:
        """Set the pruned weights aside, or to zero once the masks are frozen.

        Raises:
            UserError: the masks are not 2:4, or the rows of weights are cut between processes.
        """
        self.moving = step < self.last_step(steps)
        if self.moving:
            if next(local_flat_ranges(model), None):
                raise UserError("--mask_schedule needs whole rows of weights in each process; use --fsdp_version 2")
            for name, _, mask in masked_weights(model):
                if mask.shape[-1] % GROUP or (mask.unflatten(-1, (-1, GROUP)).sum(-1) != KEPT).any():
                    raise UserError(f"--mask_schedule needs 2:4 masks, and that of '{name}' is not; leave it at fixed")
        self.set_aside(model)
        if (
            step == 0
        ):  # a state may hold dense values under its masks, which masks of another criterion would bring back
            for values in self.pruned.values():
                values.zero_()

    @torch.no_grad()
    def set_aside(self, model: nn.Module) -> None:
        """Leave zeros in the model where masks prune, and keep the values."""
        for name, weight, mask in masked_weights(model):
            values = local(weight.data)
            if self.moving:
                self.pruned[name] = values * ~mask
            values.mul_(mask)

    @torch.no_grad()
    def bring_back(self, model: nn.Module) -> None:
        """Put the pruned values into the model."""
        for name, weight, _ in masked_weights(model):
            local(weight.data).add_(self.pruned[name])

    @contextlib.contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model holds the pruned values too, as a checkpoint must."""
        if self.moving:
            self.bring_back(model)
        try:
            yield
        finally:
            if self.moving:
                self.set_aside(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Any, step: int, steps: int, rate: float) -> None:
        """Shrink pruned weights, choose masks anew where it is time, and freeze them at the end.

        Args:
            optimizer: torch's, whose state holds the second moments.
            rate: the learning rate of this step.
        """
        freeze = step >= self.last_step(steps)
        choose = freeze or step % self.every == 0
        for _, weight, mask in masked_weights(model):
            values, state = local(weight.data), optimizer.state.get(weight, {})
            values.mul_(torch.where(mask, 1.0, max(0.0, 1 - rate * self.decay)))
            if choose:
                scores = values.float().square()
                if self.score == "saliency":
                    scores.mul_(local(state["exp_avg_sq"]))
                mask.copy_(strongest(scores))
            if freeze:  # what momentum is left would move pruned weights
                for moment in state.values():
                    if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
                        local(moment).mul_(mask)
        self.moving = not freeze
        self.set_aside(model)
        if freeze:
            self.pruned.clear()
