"""Pruning a model decoder layer by decoder layer: what is pruned, how well, on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_llama
from pruning import agree, calibration, prune, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers, head_counts
from sparsity.pts.activations import HiddenStates
from sparsity.pts.prune import collect_dense, plan, prune_layer
from sparsity.pts.recipe import QUALITY, Recipe


def test_ignored_layers_stay_dense_and_every_other_is_pruned():
    model, dense = tiny_llama(), tiny_llama()
    masks = prune(model, ignore=["*.0.mlp.*"])
    assert len(masks) == 11
    for name, parameter in model.named_parameters():
        untouched = torch.equal(parameter, dense.get_parameter(name))
        assert untouched == (name.removesuffix(".weight") not in masks), name


@pytest.mark.parametrize("quality", QUALITY)
def test_more_effort_brings_the_output_nearer_to_the_dense_model(quality):
    batches = calibration(batches=12)
    dense, plain, ours = tiny_llama(), tiny_llama(), tiny_llama()
    prune(plain, batches, Recipe())
    prune(ours, batches, QUALITY[quality])
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        target = dense(ids).logits
        assert (ours(ids).logits - target).square().mean() < (plain(ids).logits - target).square().mean()


@pytest.mark.parametrize(("architecture", "is_scaled"), [("llama", True), ("opt", True), ("gemma2", False)])
def test_the_final_norm_is_scaled_to_the_dense_model(architecture, is_scaled):
    """Gemma's gain is no plain factor, so its norm stays."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    norm = model.get_submodule("model.decoder.final_layer_norm" if architecture == "opt" else "model.norm")
    norm.weight.data.add_(0.1)
    before = norm.weight.detach().clone()
    prune(model, recipe=QUALITY["balanced"])
    scale = (norm.weight / before)[before != 0]
    assert is_scaled == (before.any() and 0.3 < scale.mean().item() < 1)
    if is_scaled:
        torch.testing.assert_close(norm.weight.detach(), before * scale.mean())
    else:
        assert torch.equal(norm.weight, before)


def states_of(model, recipe):
    """Hidden states before the first layer, that layer, and the numbers of heads."""
    _, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), torch.device("cpu"), needs_dense=recipe.needs_dense)
    return states, plan(model, recipe, [])[0], head_counts(model.config)


@pytest.mark.parametrize("quality", QUALITY)
def test_hidden_states_behind_a_layer_are_the_pruned_layers_own_output_to_the_bit(quality):
    """What a resumed run computes again must be what the interrupted run had."""
    model, recipe = tiny_llama(), QUALITY[quality]
    states, layer, heads = states_of(model, recipe)
    before = [hidden.clone() for hidden in states.pruned]
    with torch.no_grad():
        prune_layer(states, layer, recipe, heads)
        states.advance(layer, before)
    assert all(torch.equal(left, right) for left, right in zip(states.pruned, before, strict=True))


@pytest.mark.parametrize("quality", QUALITY)
@pytest.mark.parametrize("bf16", [True, False])
def test_collecting_from_the_dense_model_does_not_change_what_it_computes(bf16, quality, monkeypatch):
    """Neither where layers run in bf16 nor where, as on GPUs, they are given float32 inputs without a copy."""
    monkeypatch.setattr("sparsity.pts.activations.bf16_is_faster", lambda device: bf16)
    model, recipe = tiny_llama(), QUALITY[quality]
    states, layer, _ = states_of(model, recipe)
    expected = [hidden.clone() for hidden in states.dense]
    states.advance(layer, expected)
    with torch.no_grad():
        collect_dense(states, layer, recipe, head_counts(model.config))
    assert all(torch.equal(left, right) for left, right in zip(states.dense, expected, strict=True))


WORKER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch, torch.distributed as dist
from conftest import tiny_llama
from pruning import calibration, prune
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meet", rank=rank, world_size=2)
model = tiny_llama()
masks = prune(model, calibration(batches=4)[rank::2])
if rank == 0:
    torch.save([model.state_dict(), masks], sys.argv[2] + "/result.pt")
"""


@pytest.mark.slow
def test_two_processes_with_half_the_calibration_each_prune_as_one_with_all(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path), str(rank)], env=dict(os.environ))
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    state, masks = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = tiny_llama()
    own_masks = prune(alone, calibration(batches=4))
    assert agree(masks, own_masks) > 0.999
    for name, parameter in alone.named_parameters():
        assert (parameter - state[name]).abs().mean() < 1e-3, name
