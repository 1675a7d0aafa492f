"""Attention on CPUs, where torch's own kernel is slow: one new token, and bfloat16 without tile instructions (AMX).

In a step of generation there is one query for each query head, and all that share a key/value head attend to the same
keys. Given as several queries of that head, they are many times as fast: torch's bfloat16 kernel takes ten times as
long for one query as for two, and keys are read once for all of them.

Whole texts are split into blocks of queries, each of which attends to the keys so far by plain matrix products, which
without AMX take 0.7 of the kernel's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.devices import has_amx

QUERIES_AT_ONCE = 128  # whose scores stay in a processor's cache


@contextmanager
def fast_attention() -> Iterator[None]:
    """Within the block, models whose attention is transformers' `sdpa` compute it by `attention`."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # transformers' own shows again


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' `sdpa` computes it, by faster ways where this module has one.

    Args:
        query: [batch, heads, positions, width].  key, value: [batch, key/value heads, length, width].
        attention_mask: bool or added [batch, heads or 1, positions, length]; None shows all up to each position.

    Returns:
        [batch, positions, heads, width]; None for the weights.
    """
    positions, length = query.shape[2], key.shape[2]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if query.device.type == "cpu" and options.get("position_bias") is None and not options.get("dropout"):
        if positions == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _one_position(query, key, value, attention_mask, scale), None
        causal = getattr(module, "is_causal", True) and options.get("is_causal") in (None, True)
        fast = query.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not has_amx()
        if fast and causal and attention_mask is None and positions == length > QUERIES_AT_ONCE:
            return _causal(query, key, value, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _one_position(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, _, width = query.shape
    group = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], group, width)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)  # the second result is not used
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    output = F.scaled_dot_product_attention(queries, key, value, attention_mask, scale=scale)
    return output[:, :, :group].reshape(batch, 1, heads, -1)


@torch.autocast("cpu", enabled=False)
def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    (batch, heads, length, width), kept_heads = query.shape, key.shape[1]
    group = heads // kept_heads
    # Scores rounded to bfloat16 would double the error.
    queries, keys = (query.float() * scale).view(batch, kept_heads, group, length, width), key.float()
    output = query.new_empty(batch, length, kept_heads, group, value.shape[-1])
    for start in range(0, length, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, length)
        later = queries.new_full((end - start, end - start), float("-inf")).triu(1).repeat(group, 1)
        for row in range(batch):
            for head in range(kept_heads):
                scores = queries[row, head, :, start:end].reshape(-1, width) @ keys[row, head, :end].t()
                scores[:, start:] += later
                found = scores.softmax(-1).to(value.dtype) @ value[row, head, :end]
                output[row, start:end, head] = found.view(group, end - start, -1).transpose(0, 1)
    return output.flatten(2, 3)
