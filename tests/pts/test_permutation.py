"""Channel permutations: nothing that the model computes changes, and groups lose less."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, linears, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers, head_counts
from sparsity.pts.activations import HiddenStates
from sparsity.pts.structure import shared_inputs
from sparsity.pts.pattern import Pattern
from sparsity.pts.permutation import dealt, exchanged, permute, reorderable


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
    for index, names in enumerate(shared_inputs(model, linears(model))):
        groups = [{name: model.get_submodule(name) for name in group} for group in names]
        energies = {n: torch.rand(linear.in_features) for n, linear in reorderable(groups).items()}
        orders = permute(
            states, layers[index], index, groups, energies, head_counts(model.config), Pattern.parse(pattern)
        )
        assert [names[number][0].rpartition(".")[2] for number in orders] == reordered
        for number, order in orders.items():
            old = before[names[number][0] + ".weight"]
            assert torch.equal(model.get_submodule(names[number][0]).weight, old[:, order])
            assert not torch.equal(order, torch.arange(len(order)))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)


def lost(saliency: torch.Tensor, order: torch.Tensor) -> float:
    """What 2:4 prunes of saliencies [channels, rows] in this order."""
    groups = saliency[order].view(-1, 4, saliency.shape[1])
    return float(groups.sort(1).values[:, :2].sum())


def test_dealt_channels_lose_less_than_in_their_own_order_and_exchanged_ones_less_again():
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(64, dtype=torch.float32).div(8).exp()[:, None]  # neighbours are alike, as after sorting
    saliency = torch.randn(3, 64, 50, generator=generator).square() * strength
    orders = dealt(saliency.sum(-1), 4)
    better = exchanged(orders, saliency)
    assert torch.equal(better.sort().values, torch.arange(64).expand(3, -1))
    for block, dealt_order, exchanged_order in zip(saliency, orders, better, strict=True):
        assert lost(block, exchanged_order) < lost(block, dealt_order) < lost(block, torch.arange(64))


def test_exchange_leaves_channels_that_are_too_few():
    orders = torch.arange(4).expand(2, -1)
    assert torch.equal(exchanged(orders, torch.rand(2, 4, 5)), orders)
