"""Statistics of the inputs of linear layers."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers
from sparsity.pts.activations import HiddenStates
from sparsity.pts.prune import plan
from sparsity.pts.recipe import Recipe
from sparsity.pts.statistics import TOKENS_AT_ONCE, Statistics, stream_linears

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", ["self_attn.o_proj", "mlp.down_proj"]), ("opt", ["self_attn.out_proj", "fc2"]), ("gemma2", [])],
)
def test_only_linears_whose_output_is_simply_added_are_fitted_to_the_residual_stream(architecture, expected):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    prefix, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), CPU, needs_dense=True)
    layer = plan(model, Recipe(), [])[0]
    numbers = [number for number in stream_linears(states, layer) if number is not None]
    assert [list(layer.groups[number]) for number in numbers] == [[f"{prefix}.0.{name}"] for name in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [8, 300])
def test_tokens_count_by_their_weight(dtype, cols):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, cols, generator=generator).to(dtype) for n in (TOKENS_AT_ONCE + 500, 50))
    targets = [torch.randn(len(part), 8, generator=generator) for part in (one, other)]
    weight = torch.randn(8, cols, generator=generator)
    statistics = Statistics(cols, CPU, rows=8)
    statistics.add(one, targets[0], token_weight=1 / len(one))
    statistics.add(other, targets[1], token_weight=1 / 50)
    statistics.finish("a linear", weight)
    squares = [part.float().t() @ part.float() / len(part) for part in (one, other)]
    products = [target.t() @ part.float() / len(part) for target, part in zip(targets, (one, other), strict=True)]
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(statistics.hessian, sum(squares) / 2, rtol=rounding, atol=rounding)
    lacking = sum(products) / 2 - weight @ statistics.hessian
    torch.testing.assert_close(statistics.cross, lacking, rtol=rounding, atol=10 * rounding)
    assert torch.equal(statistics.hessian, statistics.hessian.t())
