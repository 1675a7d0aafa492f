"""Attention on CPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.attention import attention, own_attention
from sparsity.kv_cache import give_room, mark_attended, prompt_of

LENGTH, HEADS, WIDTH = 100, 6, 8  # more positions than a block has


def tensors(kept_heads, positions, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, HEADS, positions, WIDTH), (3, kept_heads, LENGTH, WIDTH), (3, kept_heads, LENGTH, WIDTH)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def layer(kept_heads, causal):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // kept_heads, causal
    return module


def shown(kind, positions):
    """A mask [3, 1, positions, LENGTH], or None: causal where there is a position for each key."""
    if kind is None:
        return None
    later = torch.arange(LENGTH) > torch.arange(LENGTH - positions, LENGTH)[:, None]
    mask = (~later).expand(3, 1, positions, LENGTH).clone()
    if kind == "padded":  # on the left, where a padding token sees itself
        mask[0, ..., :7] = False
        mask[0, 0, :, :7] |= torch.eye(LENGTH, dtype=torch.bool)[-positions:, :7]
    if kind == "packed":
        sample = torch.arange(LENGTH) // 40
        mask &= sample[-positions:, None] == sample
    if kind == "any":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., 0] = True
    return mask


@pytest.mark.parametrize("kind", [None, "padded", "packed", "any"])
@pytest.mark.parametrize(("kept_heads", "positions"), [(6, 1), (2, 1), (2, 5), (6, LENGTH), (2, LENGTH), (1, LENGTH)])
def test_attention_and_its_gradients(kept_heads, positions, kind):
    module, mask = layer(kept_heads, causal=positions == LENGTH), shown(kind, positions)
    exact, rounded = tensors(kept_heads, positions), tensors(kept_heads, positions, torch.bfloat16)
    expected, _ = sdpa_attention_forward(module, *exact, mask, scaling=0.4)
    found, _ = attention(module, *rounded, mask, scaling=0.4)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, exact, slope)
    gradients = torch.autograd.grad(found, rounded, slope.bfloat16())
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "padded", "of each head"])  # the last is left to transformers' attention
@pytest.mark.parametrize("kept_heads", [6, 2, 1])
def test_beams_that_share_a_prompt(kept_heads, kind, dtype):
    module = layer(kept_heads, causal=False)
    generator = torch.Generator().manual_seed(0)
    own, ours = DynamicCache(), DynamicCache()
    for length, beams in ((LENGTH - 3, 1), (1, 4), (1, 4), (1, 4)):
        states = [torch.randn(3 * beams, kept_heads, length, WIDTH, generator=generator).to(dtype) for _ in range(2)]
        full, shared = own.update(*states, 0), ours.update(*states, 0)
        mark_attended(*shared)
        if beams == 1:
            own.batch_repeat_interleave(4)
            ours = give_room(ours, LENGTH, 4)
    assert prompt_of(shared[0]) is not None
    query = torch.randn(12, HEADS, 1, WIDTH, generator=generator).to(dtype)
    mask = None if kind is None else shown("padded", 1).repeat_interleave(4, 0)
    if kind == "of each head":
        mask = mask.expand(-1, HEADS, -1, -1)
    expected, _ = sdpa_attention_forward(module, query.float(), *(t.float() for t in full), mask, scaling=0.4)
    found, _ = attention(module, query, *shared, mask, scaling=0.4)
    assert found.shape == expected.shape and found.dtype == dtype
    assert (found.float() - expected).norm() < {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype] * expected.norm()


def test_only_bfloat16_is_computed_by_blocks():
    module, inputs = layer(2, causal=True), tensors(2, LENGTH)
    expected, _ = sdpa_attention_forward(module, *inputs, None)
    assert torch.equal(attention(module, *inputs, None)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(module, *inputs, None)
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


def test_added_mask_is_that_of_hidden_keys():
    module, inputs = layer(2, causal=False), tensors(2, LENGTH, torch.bfloat16)
    mask = shown("packed", LENGTH)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(attention(module, *inputs, added)[0], attention(module, *inputs, mask)[0])


def test_row_without_keys_is_finite():
    module, inputs = layer(2, causal=False), tensors(2, LENGTH, torch.bfloat16)
    mask = shown("padded", LENGTH)
    mask[0, :, :3] = False
    assert torch.isfinite(attention(module, *inputs, mask)[0]).all()


def test_mask_of_a_longer_cache():
    module, inputs = layer(2, causal=False), tensors(2, 1, torch.bfloat16)
    longer = torch.ones(3, 1, 1, LENGTH + 20, dtype=torch.bool)
    assert torch.equal(attention(module, *inputs, longer)[0], attention(module, *inputs, None)[0])


def test_transformers_own_attention_returns_after_the_block():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyboardInterrupt), own_attention():
        with own_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
