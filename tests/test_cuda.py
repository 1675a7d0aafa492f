"""What runs in another way on a CUDA GPU gives what a CPU gives.

Tests see no GPU unless TEST_GPUS names it: TEST_GPUS=0 python -m pytest tests/test_cuda.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from pruning import calibration

from sparsity.evaluation.generation import shared_prefill
from sparsity.pattern import Pattern
from sparsity.pts.cuda_graphs import replayed
from sparsity.pts.layer_store import LayerStore
from sparsity.pts.prune import prune_model
from sparsity.pts.recipe import QUALITY
from sparsity.pts.solvers import damp, sparsegpt

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_replayed_function_serves_arguments_of_any_shape_and_leaves_them_as_they_are(device):
    def function(left, right):
        return left @ right, (left * 2).relu()

    for size in (3, 3, 5, 3):
        left, right = torch.randn(size, 4, device=device), torch.randn(4, size, device=device)
        before = left.clone()
        result = replayed(function, left, right)
        torch.testing.assert_close(result, function(left, right))
        assert torch.equal(left, before)


@needs_gpu
@pytest.mark.parametrize("cols", [64, 320])  # the second has a block that is not full
def test_sparsegpt(cols):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, cols, generator=generator), torch.randn(cols, 2 * cols, generator=generator)
    results = {}
    for device in ("cpu", "cuda"):
        _, factor, _ = damp((inputs @ inputs.t() / 2 / cols).to(device), 0.01)
        pruned, mask = sparsegpt(weight.to(device), factor, Pattern(2, 4))
        results[device] = pruned.cpu(), mask.cpu()
    assert Pattern().fits(results["cuda"][0])
    assert float((results["cpu"][1] == results["cuda"][1]).float().mean()) > 0.995  # rounding may tip a choice
    assert float((results["cpu"][0] - results["cuda"][0]).norm() / results["cpu"][0].norm()) < 0.05


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quality", QUALITY)
def test_pruning(quality, dtype):
    dense = tiny_llama()
    errors = {}
    for device in ("cpu", "cuda"):
        model, logs = copy.deepcopy(dense).to(torch.float32 if device == "cpu" else dtype), []
        masks = prune_model(
            model, calibration(), QUALITY[quality], torch.device(device), LayerStore(None, ""), on_rows=logs.append
        )
        errors[device] = sum(row.relative_error for row in logs[-1])
        assert all(Pattern().fits(module.weight) for name, module in model.named_modules() if name in masks)
    # Which channels form a group may differ, where two choices are as good; how much is lost does not.
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beams_that_share_their_prompt(dtype):
    model = tiny_llama(seed=3).to("cuda", dtype)
    prompts = torch.randint(2, 400, (4, 40), generator=torch.Generator().manual_seed(0)).cuda()
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    options = {"num_beams": 4, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        shared = model.generate(**inputs, **shared_prefill(model, **inputs, beams=4, new_tokens=16), **options)
        plain = model.generate(**inputs, **options)
    same = (shared == plain).all(1).float().mean()
    assert same == 1 if dtype == torch.float32 else same >= 0.5  # rounding may tip a choice between beams
