"""Recipes from options, sparsity patterns, and masks from scores."""

from __future__ import annotations

import pytest
import torch

from sparsity.errors import UserError
from sparsity.pattern import Pattern
from sparsity.pts.recipe import METHODS, QUALITY, make_recipe, score_mask


@pytest.mark.parametrize("quality", QUALITY)
def test_pattern_and_damping_replace_those_of_the_quality(quality):
    recipe = make_recipe("sparsegpt", quality, "4:8", 0.5)
    assert (recipe.pattern.n, recipe.pattern.m, recipe.percdamp) == (4, 8, 0.5)
    assert recipe.refit_iterations == QUALITY[quality].refit_iterations
    assert make_recipe("sparsegpt", quality, "2:4", None) == QUALITY[quality]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sparsegpt"])
def test_other_methods_only_choose_masks(method):
    recipe = make_recipe(method, "balanced", "2:4", None)
    assert METHODS[recipe.method].scores and not recipe.refit_iterations
    assert recipe.needs_pruned and not recipe.needs_dense


def test_every_recipe_keeps_the_hidden_states_that_it_uses():
    assert not QUALITY["fast"].needs_pruned and QUALITY["fast"].needs_dense
    assert QUALITY["balanced"].needs_pruned and QUALITY["balanced"].needs_dense


@pytest.mark.parametrize("text", ["2:5x", "3:3", "4:2", "0:4", "unstructured:1.5", "half", "8:17"])
def test_unknown_pattern_names_the_option_and_the_value(text):
    with pytest.raises(UserError, match=f"--pattern.*'{text}'"):
        make_recipe("wanda", "fast", text, None)


def test_wanda_weighs_inputs_and_magnitude_does_not():
    weight, norms = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0, 1.0, 1.0, 1.0])
    masks = {name: score_mask(METHODS[name].scores(weight, norms), Pattern()) for name in ("wanda", "sparse_magnitude")}
    assert masks["wanda"].tolist() == [[True, False, False, True]]
    assert masks["sparse_magnitude"].tolist() == [[False, False, True, True]]


def test_unstructured_masks_keep_the_same_number_in_every_row():
    mask = score_mask(torch.rand(5, 40), Pattern.parse("unstructured:0.6"))
    assert mask.sum(1).tolist() == [16] * 5
