"""Masks that move: what they keep, what a pruned weight becomes, and when they freeze."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

from sparsity.errors import UserError
from sparsity.sat.mask_schedule import MaskSchedule, strongest
from sparsity.sat.sharding import masked_weights
from sparsity.modelopt_state import MASK


def masked_model(kept: int = 2) -> torch.nn.Module:
    """A small model with the first `kept` of every four weights in its linear layers of decoder layers."""
    model = tiny_llama()
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            mask = torch.arange(layer.weight.shape[1]).remainder(4) < kept
            layer.register_buffer(MASK, mask.expand(layer.weight.shape).clone())
    return model


def run(schedule: MaskSchedule, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps as the trainer makes them, on gradients that grow every pruned weight."""
    schedule.begin(model, 0, steps)
    for step in range(1, steps + 1):
        for _, weight, mask in masked_weights(model):
            weight.grad = torch.where(mask, 0.0, -1.0 * schedule.moving)
        if schedule.moving:
            schedule.bring_back(model)
        optimizer.step()
        if schedule.moving:
            schedule.after_step(model, optimizer, step, steps, 0.1)


@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_weights_that_gradients_ask_for_take_the_place_of_others(score):
    model = masked_model()
    before = {name: mask.clone() for name, _, mask in masked_weights(model)}
    schedule = MaskSchedule(score, every=2, until=0.5, decay=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    run(schedule, model, optimizer, 8)
    assert not schedule.moving and not schedule.pruned
    for name, weight, mask in masked_weights(model):
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        assert (mask != before[name]).float().mean() > 0.4, name
        optimizer.state[weight]["exp_avg"][mask] = 0
        assert not optimizer.state[weight]["exp_avg"].any(), "momentum would move pruned weights"


def test_pruned_weights_stay_out_of_the_forward_pass_and_shrink():
    model = masked_model()
    schedule = MaskSchedule("magnitude", every=100, until=1.0, decay=5.0)
    schedule.begin(model, 0, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (1, 2):
        for _, weight, mask in masked_weights(model):
            weight.grad = torch.where(mask, 0.0, -1.0)
        schedule.bring_back(model)
        optimizer.step()
        schedule.after_step(model, optimizer, step, 8, 0.1)
    for name, weight, mask in masked_weights(model):
        assert not weight[~mask].any()
        # twice: the step adds 0.1, then half of the sum is lost
        torch.testing.assert_close(schedule.pruned[name][~mask], torch.full_like(weight[~mask], 0.075))
        with schedule.whole_weights(model):
            assert weight[~mask].all()
        assert not weight[~mask].any()


def test_a_tie_still_keeps_two():
    assert strongest(torch.zeros(3, 8)).sum(-1).tolist() == [4, 4, 4]


def test_masks_of_another_pattern_are_refused():
    with pytest.raises(UserError, match="needs 2:4 masks"):
        MaskSchedule("magnitude", 1, 0.5, 0.0).begin(masked_model(kept=3), 0, 8)
