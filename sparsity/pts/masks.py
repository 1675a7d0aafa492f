"""Masks from scores: which weights of a matrix to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity.pts.pattern import Pattern


def score_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask [rows, cols] that keeps the highest scores, per group of m or (unstructured) per row.

    >>> score_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), Pattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    rows, cols = scores.shape
    if pattern.m:
        grouped = scores.view(rows, cols // pattern.m, pattern.m)
        kept = grouped.topk(pattern.n, dim=-1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, kept, True).view(rows, cols)
    kept = scores.topk(cols - round(pattern.fraction * cols), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest absolute weights."""
    return score_mask(weight.float().abs(), pattern)


def wanda_mask(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |weight| · ‖input‖₂ (Sun et al., "Wanda", 2023, section 3)."""
    return score_mask(weight.float().abs() * hessian.diagonal().clamp(min=0).sqrt(), pattern)
