"""Attention on CPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.attention import attention, grouped_queries


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


def test_transformers_own_attention_returns_after_the_block():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyboardInterrupt), grouped_queries():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
