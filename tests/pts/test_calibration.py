"""Statistics of the inputs of linear layers."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, linears, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers
from sparsity.pts.activations import HiddenStates
from sparsity.pts.calibration import TOKENS_AT_ONCE, Scratch, Statistics, collect_residual
from sparsity.pts.discovery import shared_inputs


@pytest.mark.parametrize(("architecture", "adds"), [("llama", True), ("opt", True), ("gemma2", False)])
def test_residual_target_is_used_only_where_the_last_linear_adds_to_the_output(architecture, adds):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    prefix, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), torch.device("cpu"), needs_dense=True)
    name = shared_inputs(model, {f"{prefix}.0.{last}" for last in ("fc2", "mlp.down_proj")} & linears(model))[0][0][0]
    statistics = collect_residual(states, layers[0], 0, name, model.get_submodule(name))
    assert (statistics is not None) == adds


@pytest.mark.parametrize("cols", [8, TOKENS_AT_ONCE])
def test_statistics_that_share_memory_for_products_are_those_of_all_tokens(cols):
    generator, scratch = torch.Generator().manual_seed(0), Scratch(torch.device("cpu"))
    inputs, wanted = (torch.randn(2, TOKENS_AT_ONCE + 500, n, generator=generator) for n in (cols, 4))
    found = [Statistics(cols, scratch, rows=4) for _ in inputs]
    for part in (slice(0, 300), slice(300, None)):  # the second is more than is taken in at once
        for statistics, given, target in zip(found, inputs, wanted, strict=True):
            statistics.add(given[part], target[part])
    for statistics, given, target in zip(found, inputs, wanted, strict=True):
        statistics.finish("a linear")
        torch.testing.assert_close(statistics.hessian, given.t() @ given / len(given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.cross, target.t() @ given / len(given), rtol=1e-4, atol=1e-4)
