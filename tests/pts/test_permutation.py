"""Channel permutations: nothing that the model computes changes, and groups lose less."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers, head_counts
from sparsity.pattern import Pattern
from sparsity.pts.activations import HiddenStates
from sparsity.pts.permutation import dealt, exchanged
from sparsity.pts.prune import collect_dense, plan
from sparsity.pts.recipe import Recipe


@pytest.mark.parametrize(
    ("architecture", "reordered"),
    [
        ("llama", ["o_proj", "down_proj"]),
        ("qwen2", ["o_proj", "down_proj"]),  # with biases
        ("gemma2", ["o_proj", "down_proj"]),
        ("phi3", ["o_proj", "down_proj"]),  # q, k and v in one weight, gate and up in another
        ("opt", ["out_proj", "fc2"]),
        ("gpt_neox", ["dense_4h_to_h"]),  # q, k and v of each head lie together
    ],
)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_reordered_layers_compute_the_same(architecture, reordered, pattern):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    ids = calibration()[0]["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    _, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), torch.device("cpu"), needs_dense=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recipe = Recipe(pattern=Pattern.parse(pattern), permute=True)
    for layer in plan(model, recipe, []):
        collect_dense(states, layer, recipe, head_counts(model.config))
        names = [name for group in layer.groups for name in group if is_sorted_anew(model, before, name)]
        assert [name.rpartition(".")[2] for name in names] == reordered
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)


def is_sorted_anew(model, before: dict[str, torch.Tensor], name: str) -> bool:
    """Whether the columns of a weight, and not only its rows, have a new order."""
    weight, old = model.get_submodule(name).weight, before[name + ".weight"]
    rows_moved = torch.equal(weight.sort(0).values, old.sort(0).values)
    return not rows_moved and torch.equal(weight.sort(1).values, old.sort(1).values)


def lost(saliency: torch.Tensor, order: torch.Tensor) -> float:
    """What 2:4 prunes of saliencies [channels, rows] in this order."""
    groups = saliency[order].view(-1, 4, saliency.shape[1])
    return float(groups.sort(1).values[:, :2].sum())


def test_dealt_channels_lose_less_than_in_their_own_order_and_exchanged_ones_least():
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(64, dtype=torch.float32).div(8).exp()[:, None]  # neighbours are alike, as after sorting
    saliency = torch.randn(3, 64, 50, generator=generator).square() * strength
    orders = dealt(saliency.sum(-1), 4)
    assert torch.equal(orders.sort().values, torch.arange(64).expand(3, -1))
    better = exchanged(orders.clone(), saliency)
    assert torch.equal(better.sort().values, orders.sort().values)
    for block, order, more in zip(saliency, orders, better, strict=True):
        assert lost(block, more) < lost(block, order) < lost(block, torch.arange(64))
