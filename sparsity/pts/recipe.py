"""How each weight is pruned, and the named choices of effort."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sparsity.pts.pattern import Pattern


@dataclass(frozen=True)
class Recipe:
    """How each weight is pruned. `QUALITY` holds the three named choices for SparseGPT."""

    method: str = "sparsegpt"  # or "wanda", "magnitude"
    pattern: Pattern = field(default_factory=Pattern)
    percdamp: float = 0.01
    block_size: int = 128
    refit_iterations: int = 0  # conjugate-gradient steps of the least-squares refit
    admm_iterations: int = 0  # mask search, in place of SparseGPT's column loop
    dense_inputs: bool = False  # Hessians of the dense model's activations: fewer forward passes
    asymmetric: bool = False  # fit the last linear of each layer to the dense model's output, not to its own

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model's hidden states are kept while layers are pruned."""
        return self.dense_inputs or self.asymmetric

    @property
    def needs_pruned(self) -> bool:
        """Whether the pruned model's hidden states are kept: always, unless all is taken from the dense model's."""
        return self.asymmetric or not self.dense_inputs


# Damping ten times the paper's 0.01 keeps the refitted weights closer to the dense ones: slightly worse on text like
# the calibration set's, clearly better on other text (docs/measurements.md).
QUALITY = {
    "fast": Recipe(percdamp=0.1, refit_iterations=6, dense_inputs=True),
    "balanced": Recipe(percdamp=0.1, refit_iterations=6, dense_inputs=True, asymmetric=True),
    "best": Recipe(percdamp=0.1, refit_iterations=6, admm_iterations=16, dense_inputs=True, asymmetric=True),
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
