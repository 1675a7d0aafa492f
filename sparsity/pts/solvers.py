"""One-shot pruning of a weight matrix with second-order information: the mathematics, without any model around it.

Notation, as in Frantar & Alistarh, "SparseGPT" (2023): a linear layer has the weight W [rows, cols] and saw the
calibration inputs X [cols, tokens]; H = X Xᵀ [cols, cols] is its Hessian (up to a factor). Pruned to S, its error is
tr((S - W) H (S - W)ᵀ) = ‖S X - W X‖². All of it is 32-bit float arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from sparsity.devices import bf16_is_faster, tf32
from sparsity.errors import UserError
from sparsity.pattern import Pattern
from sparsity.pts.cuda_graphs import replayed
from sparsity.pts.recipe import score_mask

EXACT = 8  # most columns of a group whose ways of pruning are all compared: 8:16 has 12,870
BF16_FROM = 256  # columns from which bf16 speeds up products with H


def damp(
    hessian: Tensor, percdamp: float, shrinkage: float = 0.0, max_percdamp: float = 10.0
) -> tuple[Tensor, Tensor, float]:
    """Add shrinkage · diagonal + percdamp · mean(diagonal) to the diagonal of H.

    The second term grows tenfold at each failure, until H is positive definite. Means are over live inputs: one that
    never fires has a zero row in H, and its diagonal entry becomes 1.

    Args:
        hessian: [cols, cols], damped in place: for 11008 columns each matrix of its size is 485 MB. Three are needed.
        shrinkage: 0.25 makes all correlations between inputs 1 / 1.25 as strong. They are what is most specific to the
            calibration text; the energy of each input changes less from text to text.

    Returns:
        what was added to the diagonal [cols]; U [cols, cols], upper triangular with Uᵀ U = H⁻¹; the percdamp that
        worked.

    Raises:
        UserError: even percdamp = `max_percdamp` does not make it positive definite (non-finite activations).
    """
    diagonal = hessian.diagonal()
    undamped = diagonal.clone()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    diagonal[~live] = 1.0
    diagonal += shrinkage * undamped.clamp(min=0)
    added = 0.0
    while percdamp <= max_percdamp:
        diagonal += (percdamp - added) * mean
        added = percdamp
        # H reversed = L Lᵀ gives H = M Mᵀ with M upper triangular, hence H⁻¹ = M⁻ᵀ M⁻¹ and U = M⁻¹:
        # one Cholesky and one triangular inverse where the textbook does Cholesky, inverse, Cholesky.
        lower = hessian.flip(0, 1)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and torch.isfinite(lower.diagonal()).all():
            upper = lower.flip(0, 1)
            del lower
            inverse = torch.eye(len(hessian), device=hessian.device)
            torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
            return diagonal - undamped, inverse, percdamp
        percdamp = max(percdamp * 10, 1e-4)
    raise UserError("the Hessian is not positive definite at any damping: the calibration activations are not finite")


def layer_error(delta: Tensor, factor: Tensor) -> Tensor:
    """tr(Δ H Δᵀ) per row [rows], for a weight change Δ [rows, cols] and H, itself or as `fast_hessian` gave it."""
    return times(delta, factor).mul_(delta).sum(1)


def fast_hessian(hessian: Tensor) -> Tensor:
    """H in bfloat16 where its products are faster so, for those that need no more; else H itself."""
    in_bf16 = hessian.device.type == "cpu" and bf16_is_faster(hessian.device) and len(hessian) >= BF16_FROM
    return hessian.bfloat16() if in_bf16 else hessian


@tf32(True)
def times(matrix: Tensor, factor: Tensor) -> Tensor:
    """A matrix [rows, cols] float32 times H, in TF32 on GPUs, or in what `fast_hessian` gave; [rows, cols] float32."""
    return (matrix.to(factor.dtype) @ factor).to(matrix.dtype)


def group_costs(inverse_factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The cost of each way P of pruning m - n of the m columns of each group, in closed form.

    With S = (H_F)⁻¹ over the columns F from the group on (those still free to compensate), the cheapest update that
    zeroes w_P costs w_Pᵀ (S_PP)⁻¹ w_P and needs the multipliers c = (S_PP)⁻¹ w_P (Hassibi & Stork, "Optimal Brain
    Surgeon", 1993, for several weights at once). SparseGPT scores weights one by one; all patterns exactly is better
    and still cheap for m ≤ EXACT.

    Returns:
        quadratic forms [groups, patterns, m, m] that are zero outside P; bool kept [patterns, m].
    """
    m = pattern.m
    cols = len(inverse_factor)
    tiles = inverse_factor.view(cols // m, m, cols // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse = tiles.transpose(1, 2) @ tiles  # [groups, m, m], the leading block of S
    pruned = list(itertools.combinations(range(m), m - pattern.n))
    forms = torch.zeros(cols // m, len(pruned), m, m, device=inverse.device)
    kept = torch.ones(len(pruned), m, dtype=torch.bool, device=inverse.device)
    for index, columns in enumerate(pruned):
        where = torch.tensor(columns, device=inverse.device)
        kept[index, where] = False
        forms[:, index, where[:, None], where] = torch.linalg.inv(inverse[:, where[:, None], where])
    return forms, kept


def sparsegpt(
    weight: Tensor, inverse_factor: Tensor, pattern: Pattern, block_size: int = 128, sizes: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Prune group by group from left to right, each time letting all later columns make up for the loss.

    The loop of SparseGPT (Algorithm 1) with the whole group of m as its step. Columns are processed in blocks:
    inside a block updates are applied at once, to the columns after it once per block.

    Args:
        weight: [rows, cols] float32, left as it is.
        inverse_factor: U of `damp`, [cols, cols].
        sizes: rows of each of the weights that are stacked, all of which get an unstructured pattern's zeros.

    Returns:
        pruned and updated weight [rows, cols], mask [rows, cols] (True is kept).
    """
    if not 0 < pattern.m <= EXACT:
        sizes = list(sizes or weight.shape[:1])
        return sparsegpt_by_scores(weight, inverse_factor, pattern, pattern.m or block_size, sizes)
    m, cols = pattern.m, weight.shape[1]
    forms, kept = group_costs(inverse_factor, pattern)
    w = weight.t().contiguous()  # [cols, rows]: a group is then a contiguous slab
    mask = torch.empty_like(w, dtype=torch.bool)
    block_size = max(m, block_size // m * m)
    for start in range(0, cols, block_size):
        end = min(start + block_size, cols)
        block, groups = slice(start, end), slice(start // m, end // m)
        w[block], errors, ways = replayed(sweep, w[block], inverse_factor[block, block], forms[groups])
        mask[block] = kept[ways].movedim(-1, 1).flatten(0, 1)
        w[end:].addmm_(inverse_factor[block, end:].t(), errors, alpha=-1)
    mask = mask.t().contiguous()
    return w.t().contiguous().masked_fill_(~mask, 0.0), mask


def sweep(block: Tensor, inverse_factor: Tensor, forms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of `sparsegpt` over the groups of a block of columns.

    Args:
        block: [columns, rows].  inverse_factor: U of these columns.  forms: of `group_costs`, for these groups.

    Returns:
        the block with its updates [columns, rows]; the errors that later columns make up for [columns, rows]; which way
        of pruning each group chose [groups, rows].
    """
    block, m = block.clone(), forms.shape[-1]
    errors = torch.empty_like(block)
    ways = torch.empty(len(forms), block.shape[1], dtype=torch.int64, device=block.device)
    for number, form in enumerate(forms):
        here, rest = slice(number * m, (number + 1) * m), slice(number * m, None)
        group = block[here]
        multipliers = (form.flatten(0, 1) @ group).view(-1, *group.shape)  # c of each way: [patterns, m, rows]
        best = (multipliers * group).sum(1).min(0).indices  # [rows]; many times as fast as argmin
        torch.mm(inverse_factor[here, here], multipliers.gather(0, best.expand(1, m, -1))[0], out=errors[here])
        block[rest].addmm_(inverse_factor[here, rest].t(), errors[here], alpha=-1)
        ways[number] = best
    return block, errors, ways


def sparsegpt_by_scores(
    weight: Tensor, inverse_factor: Tensor, pattern: Pattern, block_size: int, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """SparseGPT's own column loop, with the weights to prune chosen by w² / U_jj² per group or block (section 3.3)."""
    w = weight.t().contiguous()
    mask = torch.empty_like(w, dtype=torch.bool)
    scale = inverse_factor.diagonal()
    for start in range(0, len(w), block_size):
        end = min(start + block_size, len(w))
        saliency = (w[start:end] / scale[start:end, None]) ** 2
        if pattern.m:
            mask[start:end] = score_mask(saliency.t(), pattern).t()
        else:
            parts = saliency.split(sizes, dim=1)
            limits = [part.flatten().kthvalue(ceil(part.numel() * pattern.fraction)).values for part in parts]
            mask[start:end] = torch.cat([part > limit for part, limit in zip(parts, limits, strict=True)], dim=1)
        errors = torch.empty_like(w[start:end])
        for j in range(start, end):
            errors[j - start] = w[j].masked_fill(mask[j], 0.0) / scale[j]
            w[j:end].addr_(inverse_factor[j, j:end], errors[j - start], alpha=-1)
        w[end:].addmm_(inverse_factor[start:end, end:].t(), errors, alpha=-1)
    mask = mask.t().contiguous()
    return w.t().contiguous().masked_fill_(~mask, 0.0), mask


def least_squares(weight: Tensor, cross: Tensor, inverse_factor: Tensor) -> Tensor:
    """The dense weight W' [rows, cols] that minimizes ‖W' X - (W X + E)‖² + ‖W' - W‖²_D, D being what H was damped by.

    Args:
        cross: E Xᵀ [rows, cols], for what is missing from the outputs of W.
        inverse_factor: U with Uᵀ U = (X Xᵀ + D)⁻¹.
    """
    return (cross @ inverse_factor.t() @ inverse_factor).add_(weight)


def refit(
    weight: Tensor, hessian: Tensor, start: Tensor, mask: Tensor, iterations: int, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Least squares on the support: the S with zeros off `mask` that minimizes tr((S - W) H (S - W)ᵀ).

    Conjugate gradients with the diagonal of H as preconditioner, all rows at once (each row is a problem of its own
    with its own step sizes). In exact arithmetic the error falls with every iteration. CPUs with instructions for it
    multiply by H in bfloat16.

    Args:
        weight: target W [rows, cols] float32.  hessian: damped H [cols, cols].  start: S to begin from, zero off mask.

    Returns:
        S [rows, cols]; its error per row [rows], larger than that of `start` in no row but for rounding.
    """
    inverse_diagonal = hessian.diagonal().reciprocal()
    factor = fast_hessian(hessian)
    s = start.clone()
    direction = weight - start  # at first the change of the weights: matrices of this size are what memory goes to
    residual = times(direction, factor)
    start_error = (direction * residual).sum(1)
    residual *= mask
    torch.mul(residual, inverse_diagonal, out=direction)
    rz = (residual * direction).sum(1, keepdim=True)
    stop = rz.sum() * tolerance**2
    for _ in range(iterations):
        curved = times(direction, factor).mul_(mask)
        alpha = rz / (direction * curved).sum(1, keepdim=True).clamp(min=1e-30)
        s.addcmul_(alpha, direction)
        residual.addcmul_(alpha, curved, value=-1)
        torch.mul(residual, inverse_diagonal, out=curved)  # its memory now holds the preconditioned residual
        rz_next = (residual * curved).sum(1, keepdim=True)
        if rz_next.sum() <= stop:
            break
        direction.mul_(rz_next / rz.clamp(min=1e-30)).add_(curved)
        rz = rz_next
    del direction, residual
    error = layer_error(s - weight, factor)
    worse = error > start_error
    s[worse] = start[worse]
    return s, torch.minimum(error, start_error)
