"""How each weight is pruned, and the named choices of effort."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sparsity.pts.pattern import Pattern


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the three named choices for SparseGPT."""

    method: str = "sparsegpt"  # or "wanda", "magnitude"
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01  # damping, as a share of the Hessian's mean diagonal
    shrinkage: float = 0.0  # damping of each input, as a share of its own diagonal entry
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    admm_iterations: int = 0  # mask search, in place of SparseGPT's column loop
    dense_inputs: bool = False  # Hessians of the dense model's activations: fewer forward passes
    permute: bool = False  # deal channels to the pattern's groups by their importance, where that changes no output
    asymmetric: bool = False  # fit what adds to the residual stream to the dense model's stream, not to its own output

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model's hidden states are kept while layers are pruned."""
        return self.dense_inputs or self.asymmetric

    @property
    def needs_pruned(self) -> bool:
        """Whether the pruned model's hidden states are kept: always, unless all is taken from the dense model's."""
        return self.asymmetric or not self.dense_inputs


# Shrinkage keeps the refitted weights closer to the dense ones along directions that only the calibration text has:
# slightly worse on text of its kind, clearly better on other text (docs/measurements.md).
_FAST = Recipe(percdamp=0.01, shrinkage=0.3, refit_iterations=4, dense_inputs=True, permute=True)
QUALITY = {
    "fast": _FAST,
    "balanced": replace(_FAST, asymmetric=True),
    "best": replace(_FAST, asymmetric=True, admm_iterations=16),
}


METHODS = ("sparsegpt", "sparse_magnitude", "wanda")  # values of --sparsity_fmt


def make_recipe(sparsity_fmt: str, quality: str, pattern: str, percdamp: float | None) -> Recipe:
    """The recipe of hf_pts.py's options.

    Args:
        percdamp: in place of the quality's own; None keeps it.

    Raises:
        UserError: an unknown pattern.
    """
    parsed = Pattern.parse(pattern)
    if sparsity_fmt != "sparsegpt":
        return Recipe(method=sparsity_fmt.removeprefix("sparse_"), pattern=parsed)
    recipe = replace(QUALITY[quality], pattern=parsed)
    return replace(recipe, percdamp=percdamp) if percdamp else recipe
