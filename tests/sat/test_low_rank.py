"""Masked low-rank updates: their product and gradients, masks kept in the weights, and merging."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_matrix, tiny_llama
from torch import nn

from sparsity.errors import UserError
from sparsity.modelopt_state import load_state, load_weights, not_plus_zero, sparse_masks
from sparsity.models import model_without_weights
from sparsity.sat.fsdp import allocate, fill, model_state
from sparsity.sat.low_rank import (
    LowRankLinear,
    MaskedLowRankProduct,
    add_low_rank,
    mark_pruned,
    merge,
)

SCALE = 0.7


@pytest.fixture
def layer():
    """A layer [32, 64] with bias, rank 4 and factors that are not zero; (layer, its mask)."""
    linear = nn.Linear(64, 32)
    weight = sparse_matrix(32, 64)
    mask = weight != 0
    weight[0, mask[0].nonzero()[0]] = 0.0  # a kept weight that happens to be zero
    linear.weight.data, linear.weight.requires_grad = weight, False
    low_rank = LowRankLinear(linear, 4, SCALE, torch.Generator().manual_seed(0))
    mark_pruned(low_rank.weight, mask)
    nn.init.normal_(low_rank.lora_B, generator=torch.Generator().manual_seed(1))
    return low_rank, mask


def test_product_and_gradients_equal_autograd_of_the_formula(layer):
    low_rank, mask = layer
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    target = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    leaves = [x, low_rank.lora_A, low_rank.lora_B, low_rank.bias]

    effective = low_rank.weight + mask * (SCALE * low_rank.lora_B @ low_rank.lora_A)
    plain = x @ effective.T + low_rank.bias
    wanted = torch.autograd.grad((plain * target).sum(), leaves)
    ours = low_rank(x)
    torch.testing.assert_close(ours, plain)
    for gradient, expected in zip(torch.autograd.grad((ours * target).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(  # in float64, whose bits are masks too
        lambda x, A, B: MaskedLowRankProduct.apply(x, low_rank.weight.double(), A, B, SCALE),
        [leaf.detach().double().requires_grad_() for leaf in leaves[:3]],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_carry_their_masks(dtype):
    weight = sparse_matrix().to(dtype)
    mask = weight != 0
    before = weight.clone()
    weight[~mask] = -3.0  # modelopt may keep dense weights beside a mask
    weight[mask] *= torch.arange(int(mask.sum())) % 5 != 0  # and kept weights may be zero
    mark_pruned(weight, mask)
    assert torch.equal(not_plus_zero(weight), mask)
    assert torch.equal(not_plus_zero(weight.clone()), mask)
    assert (weight[~mask] == 0).all() and ((weight == before) | (weight == 0)).all()


def prepared(model_dir, state_path, dtype, rank=4):
    state = load_state(state_path)["model_state_dict"]
    model = model_without_weights(str(model_dir), dtype)
    add_low_rank(model, state, rank, SCALE, seed=0, embeddings=False)
    allocate(model)
    fill(model, state)
    return model, state


def test_merged_state_computes_what_was_trained(model_dir, state_path):
    from sparsity.models import load_model

    model, state = prepared(model_dir, state_path, torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    trained = model_state(model, trained_only=True)
    assert trained.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    result = merge(state, trained, SCALE)
    assert result.keys() == state.keys()
    for name, weight, mask in sparse_masks(result):
        path = name.removesuffix("weight")
        product = trained[path + "lora_B"] @ trained[path + "lora_A"]
        torch.testing.assert_close(weight, (state[name] + SCALE * product) * mask)
        assert weight.dtype == state[name].dtype and torch.equal(mask, state[f"{path}_weight_mask"])
        assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()
    plain = load_model(str(model_dir))
    load_weights(plain, {"model_state_dict": result}, "result")
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_trained_is_float32_and_the_rest_stays_in_the_compute_dtype(model_dir, state_path):
    model, _ = prepared(model_dir, state_path, torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_A", "lora_B", "weight"}
    assert all("norm" in name for name in trained if name.endswith("weight"))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    hidden = []
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].dtype))
    model.lm_head(model.model(input_ids=torch.arange(2, 20)[None]).last_hidden_state).sum().backward()
    assert hidden == [torch.bfloat16]
    # B is zero at first, so that A has no gradient yet.
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if not name.endswith("lora_A"))


def test_a_rank_above_the_smaller_side_is_refused(model_dir, state_path):
    with pytest.raises(UserError, match=r"--lora_rank 33 exceeds the smaller side of 'model\.layers\.0\..*\(32 x 32\)"):
        prepared(model_dir, state_path, torch.float32, rank=33)


def test_layers_that_are_not_linear_are_refused():
    model = tiny_llama()
    state = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    state["model.embed_tokens._weight_mask"] = torch.ones(400, 32, dtype=torch.bool)
    with pytest.raises(UserError, match="'model.embed_tokens' is a Embedding; --lora_rank trains pruned linear layers"):
        add_low_rank(model, state, 4, SCALE, 0, embeddings=False)
