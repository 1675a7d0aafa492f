"""Attention on CPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity import attention as own
from sparsity.attention import QUERIES_AT_ONCE, attention, fast_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kept_heads", "positions"), [(6, 1), (2, 1), (2, 5)])
def test_attention_is_transformers_own(kept_heads, positions, masked, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 6, positions, 8), (3, kept_heads, 20, 8), (3, kept_heads, 20, 8)]
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    mask = torch.rand(3, 1, positions, 20, generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // kept_heads, positions > 1
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = attention(module, query, key, value, mask, scaling=0.3)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kept_heads", [6, 2])
@pytest.mark.parametrize("length", [QUERIES_AT_ONCE + 1, 3 * QUERIES_AT_ONCE])
def test_causal_attention_by_blocks_is_that_of_whole_texts(length, kept_heads, monkeypatch):
    monkeypatch.setattr(own, "has_amx", lambda: False)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, heads, length, 8) for heads in (6, kept_heads, kept_heads)]
    query, key, value = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // kept_heads, True
    single = [tensor.float() for tensor in (query, key, value)]
    exact, _ = sdpa_attention_forward(module, *single, None)
    with torch.no_grad():
        found, _ = attention(module, query, key, value, None)
    rounded, _ = sdpa_attention_forward(module, query, key, value, None)
    assert not torch.equal(found, rounded)
    assert (found - exact).norm() < 1.5 * (rounded - exact).norm() < 0.01 * exact.norm()


def test_transformers_own_attention_returns_after_the_block():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyboardInterrupt), fast_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
