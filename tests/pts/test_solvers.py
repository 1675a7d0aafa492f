"""The pruning mathematics on small random problems, against brute force and plain references."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsity.errors import UserError
from sparsity.pattern import Pattern
from sparsity.pts.recipe import score_mask
from sparsity.pts.solvers import damp, group_costs, layer_error, least_squares, refit, sparsegpt

TWO_FOUR = Pattern.parse("2:4")


def problem(rows: int = 24, cols: int = 64, tokens: int = 256, seed: int = 0):
    """Weight [rows, cols] and the Hessian of correlated inputs of uneven energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    energy = torch.rand(cols, 1, generator=generator).mul(2).exp()
    inputs = mixing @ (energy * torch.randn(cols, tokens, generator=generator))
    return torch.randn(rows, cols, generator=generator), inputs @ inputs.t() / tokens


def error(pruned, weight, hessian) -> float:
    return float(layer_error(pruned - weight, hessian).sum() / layer_error(weight, hessian).sum())


def is_n_of_m(mask, pattern) -> bool:
    return bool((mask.view(-1, pattern.m).sum(1) == pattern.n).all())


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "8:16", "unstructured:0.5"])
def test_pattern_is_exact_and_pruned_weights_are_zero(text):
    pattern = Pattern.parse(text)
    weight, hessian = problem()
    _, factor, _ = damp(hessian, 0.01)
    sizes = [10, len(weight) - 10]
    pruned, mask = sparsegpt(weight, factor, pattern, block_size=32, sizes=sizes)
    assert bool((pruned[~mask] == 0).all())
    if pattern.m:
        assert is_n_of_m(mask, pattern)
    else:
        assert [float(part.float().mean()) for part in mask.split(sizes)] == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_update_and_refit_each_beat_what_came_before(seed):
    weight, hessian = problem(seed=seed)
    _, factor, _ = damp(hessian, 0.01)
    pruned, mask = sparsegpt(weight, factor, TWO_FOUR)
    fitted, _ = refit(weight, hessian, pruned, mask, 50)
    assert error(pruned, weight, hessian) < error(weight * mask, weight, hessian)
    assert error(pruned, weight, hessian) < error(weight * score_mask(weight.abs(), TWO_FOUR), weight, hessian)
    assert error(fitted, weight, hessian) <= error(pruned, weight, hessian)


def test_whole_groups_beat_the_single_weight_scores_of_the_paper():
    total_ours, total_paper = 0.0, 0.0
    for seed in range(10):
        weight, hessian = problem(seed=seed)
        _, factor, _ = damp(hessian, 0.01)
        total_ours += error(sparsegpt(weight, factor, TWO_FOUR)[0], weight, hessian)
        total_paper += error(paper_sparsegpt(weight, factor), weight, hessian)
    assert total_ours < total_paper


def paper_sparsegpt(weight, factor):
    """SparseGPT's Algorithm 1 for 2:4, column by column, as plainly as it can be written."""
    w = weight.clone()
    for j in range(w.shape[1]):
        if j % 4 == 0:
            scores = (w[:, j : j + 4] / factor.diagonal()[j : j + 4]) ** 2
            keep = score_mask(scores, TWO_FOUR)
        kept = w[:, j] * keep[:, j % 4]
        w[:, j:] -= ((w[:, j] - kept) / factor[j, j])[:, None] * factor[j, j:]
        w[:, j] = kept
    return w


def test_block_size_does_not_change_the_result():
    weight, hessian = problem()
    _, factor, _ = damp(hessian, 0.01)
    whole, mask = sparsegpt(weight, factor, TWO_FOUR, block_size=64)
    blocked, blocked_mask = sparsegpt(weight, factor, TWO_FOUR, block_size=16)
    assert torch.equal(mask, blocked_mask)
    torch.testing.assert_close(whole, blocked, atol=1e-4, rtol=1e-4)


def test_group_costs_are_the_least_squares_optimum():
    weight, hessian = problem(rows=6, cols=4)
    _, factor, _ = damp(hessian, 0.01)
    forms, kept = group_costs(factor, TWO_FOUR)
    for pattern in range(len(kept)):
        mask = kept[pattern].expand_as(weight)
        _, optimum = refit(weight, hessian, weight * mask, mask, 50, tolerance=0)
        cost = torch.einsum("ra,ab,rb->r", weight, forms[0, pattern], weight)
        torch.testing.assert_close(cost, optimum, rtol=1e-3, atol=1e-4)


def test_brute_force_bounds_every_method():
    weight, hessian = problem(rows=3, cols=8, tokens=32, seed=3)
    _, factor, _ = damp(hessian, 0.01)
    pairs = list(itertools.combinations(range(4), 2))
    optimum = torch.full((3,), float("inf"))
    for left, right in itertools.product(pairs, pairs):
        mask = torch.zeros(3, 8, dtype=torch.bool)
        mask[:, list(left)] = True
        mask[:, [4 + column for column in right]] = True
        optimum = torch.minimum(optimum, refit(weight, hessian, weight * mask, mask, 100, tolerance=0)[1])
    pruned, mask = sparsegpt(weight, factor, TWO_FOUR)
    for candidate in (pruned, refit(weight, hessian, pruned, mask, 100)[0]):
        errors = layer_error(candidate - weight, hessian)
        assert bool((errors >= optimum * (1 - 1e-3)).all())
    assert float(layer_error(pruned - weight, hessian).sum()) < 3 * float(optimum.sum())


@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_refit_never_raises_the_error_of_a_row(iterations):
    weight, hessian = problem()
    _, factor, _ = damp(hessian, 0.01)
    pruned, mask = sparsegpt(weight, factor, TWO_FOUR)
    fitted, errors = refit(weight, hessian, pruned, mask, iterations)
    assert bool((fitted[~mask] == 0).all())
    assert bool((layer_error(fitted - weight, hessian) <= layer_error(pruned - weight, hessian)).all())
    assert bool((errors <= layer_error(pruned - weight, hessian)).all())
    torch.testing.assert_close(errors, layer_error(fitted - weight, hessian))


def test_singular_hessian_is_damped_more_until_it_works():
    inputs = torch.ones(16, 1) * 1e4
    hessian = inputs @ inputs.t() - 1e3 * torch.eye(16)  # slightly indefinite, as rounding can make it
    undamped = hessian.clone()
    added, factor, used = damp(hessian, 1e-6)
    assert used > 1e-6
    torch.testing.assert_close(hessian, undamped + torch.diag(added))
    torch.testing.assert_close(factor.t() @ factor @ hessian, torch.eye(16), atol=1e-2, rtol=0)


def test_inputs_that_never_fire_are_pruned_without_harm():
    weight, hessian = problem()
    hessian[:8] = 0
    hessian[:, :8] = 0
    _, factor, _ = damp(hessian, 0.01)
    pruned, mask = sparsegpt(weight, factor, TWO_FOUR)
    assert torch.isfinite(pruned).all()
    assert is_n_of_m(mask, TWO_FOUR)


def test_hessian_of_nan_is_refused():
    with pytest.raises(UserError, match="not finite"):
        damp(torch.full((4, 4), float("nan")), 0.01)


def test_shrinkage_adds_a_fraction_of_each_diagonal_entry():
    _, hessian = problem()
    undamped = hessian.clone()
    added, factor, _ = damp(hessian, 0.01, shrinkage=0.5)
    expected = 0.5 * undamped.diagonal() + 0.01 * undamped.diagonal().mean()
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(hessian, undamped + torch.diag(expected))
    torch.testing.assert_close(factor.t() @ factor @ hessian, torch.eye(64), atol=1e-3, rtol=0)


def test_least_squares_makes_up_for_what_is_missing():
    generator = torch.Generator().manual_seed(0)
    inputs, weight, target = (torch.randn(*size, generator=generator) for size in ((16, 400), (8, 16), (8, 16)))
    hessian = inputs @ inputs.t()
    missing = target @ inputs - weight @ inputs
    _, factor, _ = damp(hessian, 1e-6)
    torch.testing.assert_close(least_squares(weight, missing @ inputs.t(), factor), target, rtol=1e-3, atol=1e-3)
