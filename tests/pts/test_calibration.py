"""Statistics of the inputs of linear layers."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, linears, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers
from sparsity.pts.activations import HiddenStates
from sparsity.pts.calibration import TOKENS_AT_ONCE, Scratch, Statistics, stream_writers
from sparsity.pts.structure import shared_inputs


@pytest.mark.parametrize(
    ("architecture", "writers"),
    [("llama", ["self_attn.o_proj", "mlp.down_proj"]), ("opt", ["self_attn.out_proj", "fc2"]), ("gemma2", [])],
)
def test_only_linears_whose_output_is_simply_added_are_fitted_to_the_residual_stream(architecture, writers):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    prefix, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), torch.device("cpu"), needs_dense=True)
    plan = shared_inputs(model, linears(model))[0]
    groups = [{name: model.get_submodule(name) for name in names} for names in plan]
    found = stream_writers(states, layers[0], 0, groups)
    numbers = [number for number in (found.inner, found.last) if number is not None]
    assert [plan[number] for number in numbers] == [[f"{prefix}.0.{name}"] for name in writers]
    assert found.parent == ("self_attn" if writers else None)


@pytest.mark.parametrize("cols", [8, TOKENS_AT_ONCE])
def test_statistics_that_share_memory_for_products_are_those_of_all_tokens(cols):
    generator, scratch = torch.Generator().manual_seed(0), Scratch(torch.device("cpu"))
    inputs, lacking = (torch.randn(2, TOKENS_AT_ONCE + 500, n, generator=generator) for n in (cols, 4))
    found = [Statistics(cols, scratch, rows=4) for _ in inputs]
    for part in (slice(0, 300), slice(300, None)):  # the second is more than is taken in at once
        for statistics, given, target in zip(found, inputs, lacking, strict=True):
            statistics.add(given[part], target[part])
    for statistics, given, target in zip(found, inputs, lacking, strict=True):
        statistics.finish("a linear")
        torch.testing.assert_close(statistics.hessian, given.t() @ given / len(given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.cross, target.t() @ given / len(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_count_by_their_weight(dtype):
    generator, scratch = torch.Generator().manual_seed(0), Scratch(torch.device("cpu"))
    one, other = (torch.randn(n, 300, generator=generator).to(dtype) for n in (700, 50))
    lacking = [torch.randn(len(part), 8, generator=generator) for part in (one, other)]
    statistics = Statistics(300, scratch, rows=8)
    statistics.add(one, lacking[0], token_weight=1 / 700)
    statistics.add(other, lacking[1], token_weight=1 / 50)
    statistics.finish("a linear")
    squares = [part.float().t() @ part.float() / len(part) for part in (one, other)]
    products = [e.t() @ part.float() / len(part) for e, part in zip(lacking, (one, other), strict=True)]
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(statistics.hessian, sum(squares) / 2, rtol=rounding, atol=rounding)
    torch.testing.assert_close(statistics.cross, sum(products) / 2, rtol=rounding, atol=rounding)
    assert torch.equal(statistics.hessian, statistics.hessian.t())
    weight = torch.randn(8, 300, generator=generator)
    lacking = statistics.cross - weight @ statistics.hessian
    statistics.subtract_outputs(weight)
    torch.testing.assert_close(statistics.cross, lacking, rtol=1e-4, atol=1e-4)
