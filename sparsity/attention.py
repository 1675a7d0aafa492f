"""Attention of one new token on CPUs, where torch's bfloat16 kernel takes ten times as long for one query as for two.

In a step of generation there is one query for each query head, and all that share a key/value head attend to the same
keys. Given as several queries of that head, they take the fast path, and keys are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def grouped_queries() -> Iterator[None]:
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
    """Attention as transformers' `sdpa` computes it; on a CPU, heads that share keys at once if there is one position.

    Args:
        query: [batch, heads, positions, width].  key, value: [batch, key/value heads, length, width].
        attention_mask: bool or added [batch, heads or 1, positions, length]; None shows all.

    Returns:
        [batch, positions, heads, width]; None for the weights.
    """
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    plain = options.get("position_bias") is None and not options.get("dropout")
    if query.device.type != "cpu" or query.shape[2] != 1 or not shared_mask or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, width = query.shape
    group = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], group, width)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)  # the second result is not used
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    output = F.scaled_dot_product_attention(queries, key, value, attention_mask, scale=options.get("scaling"))
    return output[:, :, :group].reshape(batch, 1, heads, -1), None
