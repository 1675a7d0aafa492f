"""Experts of a mixture: seen as linear layers, pruned on their own tokens, kept through restoring and export."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, prune

from benchmarks.tiny_models import tiny_model
from sparsity.models import decoder_layers
from sparsity.pts.experts import Experts, expert_counts, expert_weights, one_by_one
from sparsity.pts.recipe import make_recipe
from sparsity.pts.statistics import Statistics, fill_up

FAMILIES = ["mixtral", "gpt_oss", "llama4_text", "granitemoe", "jetmoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_compute_what_the_experts_do(family):
    model = tiny_model(family)
    layers, counts = decoder_layers(model)[1], expert_counts(model.config)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad(), one_by_one(model):
        expected = model(input_ids=tokens).logits
        for layer in layers:
            experts, original = Experts(layer, expert_weights(layer, counts).keys()), layer.forward

            def forward(*args, experts=experts, original=original, **kwargs):
                with experts:
                    return original(*args, **kwargs)

            layer.forward = forward
        logits = model(input_ids=tokens).logits
    assert experts.linears
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["sparsegpt", "sparse_magnitude"])
def test_experts_are_pruned(family, method):
    """Every expert is 2:4 along its inputs, which for gpt-oss and Llama 4 are the rows of what is stored."""
    model = tiny_model(family)
    masks = prune(model, recipe=make_recipe(method, "balanced", "2:4", None))
    stacked = {name: mask for name, mask in masks.items() if mask.dim() == 3}
    assert (
        stacked.keys() == expert_weights(decoder_layers(model)[1], expert_counts(model.config), "model.layers").keys()
    )
    for name, mask in stacked.items():
        inputs_last = mask if family in ("mixtral", "granitemoe", "jetmoe") else mask.transpose(1, 2)
        assert bool((inputs_last.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
        assert not model.get_parameter(name)[~mask].any()


def test_error_of_an_expert_counts_its_own_tokens_only():
    """Pruning with statistics leaves less error in a mixture's output than pruning by magnitude."""
    batches, errors = calibration(batches=6), {}
    for method in ("sparsegpt", "sparse_magnitude"):
        model = tiny_model("mixtral")
        with torch.no_grad():
            expected = model(**batches[0]).logits
            prune(model, batches, make_recipe(method, "balanced", "2:4", None))
            errors[method] = (model(**batches[0]).logits - expected).norm()
    assert errors["sparsegpt"] < errors["sparse_magnitude"]


def test_experts_with_few_tokens_take_the_mean_of_the_others():
    many, few, none = (Statistics(8, torch.device("cpu")) for _ in range(3))
    many.add(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    few.add(torch.ones(4, 8))
    weight = torch.zeros(8, 8)
    for statistics in (many, few, none):
        statistics.finish("expert", weight)
    own = many.hessian.clone()
    mean = (64 * many.hessian + 4 * few.hessian) / 68
    fill_up([many, few, none])
    assert torch.equal(many.hessian, own)
    torch.testing.assert_close(none.hessian, mean)
    torch.testing.assert_close(few.hessian, (torch.ones(8, 8) + mean) / 2)
