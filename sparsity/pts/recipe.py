"""How each weight is pruned: methods, and named trade-offs between speed and quality.

Imported before torch is, so that `hf_pts.py --help` and wrong options take no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING

from sparsity.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor


def score_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask [rows, cols] that keeps the weights with the highest scores, per group of m or (unstructured) per row.

    >>> import torch
    >>> score_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), Pattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    import torch

    grouped = scores.unflatten(1, (-1, pattern.m)) if pattern.m else scores
    size = grouped.shape[-1]
    kept = grouped.topk(pattern.n if pattern.m else size - ceil(pattern.fraction * size), dim=-1).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, kept, True).view_as(scores)


def magnitude(weight: Tensor, input_norms: Tensor | None) -> Tensor:
    """|W|."""
    return weight.abs()


def wanda(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Sun et al., "Wanda", 2023, section 3)."""
    return weight.abs() * input_norms


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        scores: from the weight of one linear layer [rows, cols] float32 and the root mean square of each of its inputs
            [cols] to scores [rows, cols]; the highest are kept as they are. None: SparseGPT, which also updates them.
        mode: modelopt's mode for a state pruned so. Both restore in the same way; modelopt has none for Wanda.
        needs_text: False if the scores depend on nothing but the weight.
    """

    scores: Callable[..., Tensor] | None = None
    mode: str = "sparse_magnitude"
    needs_text: bool = True


METHODS = {  # by value of --sparsity_fmt
    "sparsegpt": Method(mode="sparsegpt"),
    "sparse_magnitude": Method(magnitude, needs_text=False),
    "wanda": Method(wanda),
}


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the two named choices for SparseGPT."""

    method: str = "sparsegpt"  # a key of METHODS
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01  # damping, as a fraction of the Hessian's mean diagonal
    shrinkage: float = 0.0  # damping of each input, as a fraction of its own diagonal entry
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    dense_inputs: bool = False  # Hessians of the dense model's activations: fewer forward passes
    permute: bool = False  # deal channels to the pattern's groups by importance, where that changes no output
    asymmetric: bool = False  # fit layers that write to the residual stream to the dense model's stream

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model's hidden states are kept while layers are pruned."""
        return self.dense_inputs or self.asymmetric

    @property
    def needs_pruned(self) -> bool:
        """Whether the pruned model's hidden states are kept: unless everything is taken from the dense model's."""
        return self.asymmetric or not self.dense_inputs


# Shrinkage keeps the refitted weights closer to the dense ones along directions that only the calibration text has:
# slightly worse on text of its kind, clearly better on other text (docs/measurements.md).
_FAST = Recipe(percdamp=0.01, shrinkage=0.3, refit_iterations=4, dense_inputs=True, permute=True)
QUALITY = {"fast": _FAST, "balanced": replace(_FAST, asymmetric=True)}


def make_recipe(sparsity_fmt: str, quality: str, pattern: str, percdamp: float | None) -> Recipe:
    """The recipe for hf_pts.py's options.

    Args:
        percdamp: replaces the recipe's own unless None.

    Raises:
        UserError: an unknown pattern.
    """
    recipe = QUALITY[quality] if sparsity_fmt == "sparsegpt" else Recipe(sparsity_fmt)
    return replace(recipe, pattern=Pattern.parse(pattern), percdamp=percdamp or recipe.percdamp)
