"""What --keep_dense chooses: the linear layers that cost most when pruned, within the budget."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import tiny_llama
from pruning import calibration
from torch.nn import functional

from sparsity.errors import UserError
from sparsity.pattern import Pattern
from sparsity.pts.dense_budget import choose_dense, pruning_costs
from sparsity.pts.recipe import score_mask, wanda
from sparsity.pts.structure import choose_weights

CPU = torch.device("cpu")


def test_costs_rank_layers_as_the_rise_of_the_divergence_does():
    model, pattern = tiny_llama().eval(), Pattern(2, 4)
    chosen, _ = choose_weights(model, pattern, [])
    linears = {name: model.get_submodule(name) for name in chosen}
    sequences = [ids[None] for batch in calibration(batches=12) for ids in batch["input_ids"]]
    measured = dict.fromkeys(linears, 0.0)
    for ids in sequences:
        inputs = {}
        note = partial(dict.__setitem__, inputs)
        hooks = [
            linear.register_forward_hook(lambda _, args, __, note=note, name=name: note(name, args[0]))
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            dense = model(ids).logits[0].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            for name, x in inputs.items():
                pruned = copy.deepcopy(model)
                weight = pruned.get_submodule(name).weight
                weight *= score_mask(wanda(weight, x.flatten(0, 1).square().mean(0).sqrt()), pattern)
                now = pruned(ids).logits[0].log_softmax(-1)
                measured[name] += functional.kl_div(now, dense, reduction="sum", log_target=True).item()
    costs = pruning_costs(model, sequences, linears, pattern)
    ranks = torch.tensor([[values[name] for name in linears] for values in (costs, measured)]).argsort(1).argsort(1)
    assert torch.corrcoef(ranks.float())[0, 1] > 0.9
    assert sum(costs.values()) == pytest.approx(sum(measured.values()), rel=0.3)


def test_a_budget_below_the_smallest_layer_is_refused():
    with pytest.raises(UserError, match="--keep_dense 0.001 keeps nothing; the smallest layer has a share of 0.0"):
        choose_dense(tiny_llama(), calibration(), Pattern(2, 4), [], 0.001, CPU)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_budget_is_used_and_not_exceeded(fraction):
    model = tiny_llama()
    kept = choose_dense(model, calibration(), Pattern(2, 4), ["*.0.mlp.*"], fraction, CPU)
    chosen, _ = choose_weights(model, Pattern(2, 4), ["*.0.mlp.*"])
    sizes = {name: model.get_submodule(name).weight.numel() for name in chosen}
    left = fraction * sum(sizes.values()) - sum(sizes[name] for name in kept)
    assert kept and 0 <= left < min(size for name, size in sizes.items() if name not in kept)
    assert not any(".0.mlp." in name for name in kept)
