"""Recipes from options."""

from __future__ import annotations

import pytest

from sparsity.errors import UserError
from sparsity.pts.recipe import QUALITY, make_recipe


@pytest.mark.parametrize("quality", QUALITY)
def test_pattern_and_damping_are_laid_over_the_quality(quality):
    recipe = make_recipe("sparsegpt", quality, "4:8", 0.5)
    assert (recipe.pattern.n, recipe.pattern.m, recipe.percdamp) == (4, 8, 0.5)
    assert recipe.admm_iterations == QUALITY[quality].admm_iterations
    assert make_recipe("sparsegpt", quality, "2:4", None) == QUALITY[quality]


@pytest.mark.parametrize(("sparsity_fmt", "method"), [("wanda", "wanda"), ("sparse_magnitude", "magnitude")])
def test_other_methods_only_choose_masks(sparsity_fmt, method):
    recipe = make_recipe(sparsity_fmt, "best", "2:4", None)
    assert recipe.method == method and not recipe.refit_iterations
    assert recipe.needs_pruned and not recipe.needs_dense


def test_every_recipe_keeps_the_hidden_states_that_it_uses():
    assert not QUALITY["fast"].needs_pruned and QUALITY["fast"].needs_dense
    assert QUALITY["balanced"].needs_pruned and QUALITY["balanced"].needs_dense


def test_unknown_pattern_names_the_option():
    with pytest.raises(UserError, match="--pattern '3:3'"):
        make_recipe("wanda", "fast", "3:3", None)
