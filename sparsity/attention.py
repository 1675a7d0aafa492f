"""Attention on CPUs, where torch's bfloat16 kernel takes twice the time of plain products, or more.

Positions are taken a block at a time. A block of queries, with all query heads that share a key/value head, is
multiplied only with the keys that it can see, and its scores stay in the processor's cache until they are used up. The
backward pass computes them again, as in FlashAttention (Dao et al. 2022, section 3.1), so that nothing of the size
positions x positions is kept. Scores are rounded to bfloat16, as in transformers' eager attention.
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

from sparsity.caches import buffer_of

ROWS = 192  # of scores in a block: one for each of its positions and each query head of a key/value head


@contextmanager
def cpu_attention() -> Iterator[None]:
    """Within the block, models whose attention is transformers' `sdpa` compute it by `attention`."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' `sdpa` computes it; in bfloat16 on a CPU, by `BlockedAttention`.

    Args:
        query: [batch, heads, positions, width].  key, value: [batch, key/value heads, length, width].
        attention_mask: bool or added [batch, heads or 1, positions, length]; None shows all, or what is not later.

    Returns:
        [batch, positions, heads, width]; None for the weights.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type != "cpu" or not _is_plain(attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    causal = options.get("is_causal")
    causal = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else bool(causal))
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if query.shape[2] == 1:
        return _of_one_position(query, key, value, attention_mask, scale), None
    if query.dtype != torch.bfloat16 or (causal and query.shape[2] != key.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _by_blocks(query, key, value, attention_mask, causal, scale), None


def _is_plain(mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether all heads attend alike, without options that this module does not have."""
    return (
        (mask is None or mask.shape[1] == 1)
        and not any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
        and options.get("position_bias") is None
    )


def _of_one_position(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of a step of generation, [batch, 1, heads, width].

    Products of parts of a cache would copy them, so those in bfloat16 are of the whole buffers, where keys that are not
    there yet are hidden. Otherwise the query heads that share a key/value head are given as several queries of it: keys
    are read once for all, and torch's bfloat16 kernel takes ten times as long for one query as for two.
    """
    batch, heads, _, width = query.shape
    keys, values = buffer_of(key), buffer_of(value)
    if query.dtype == torch.bfloat16 and keys is not None and values is not None:
        added = query.new_zeros(1, 1, 1, key.shape[2]) if mask is None else _added(mask, query.dtype)
        added = F.pad(added, (0, keys.shape[2] - key.shape[2]), value=torch.finfo(query.dtype).min)
        return _by_blocks(query, keys, values, added, False, scale)
    group = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], group, width)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)  # the second result is not used
    output = F.scaled_dot_product_attention(queries, key, value, mask, scale=scale)
    return output[:, :, :group].reshape(batch, 1, heads, -1)


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    added = None if mask is None else _added(mask, query.dtype)
    with torch.autocast("cpu", enabled=False):
        return BlockedAttention.apply(query, key, value, added, causal, scale)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores; the lowest finite value hides, so that a row without keys has no NaN."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class BlockedAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ + mask) · value, a block of positions at a time, for no gradient of the mask."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """Args: see `attention`; the mask is one that is added. Returns [batch, positions, heads, width]."""
        blocks = _Blocks(query, key, value, mask, causal, scale)
        output = torch.empty(*blocks.queries.shape[:2], value.shape[-1], dtype=value.dtype)
        for rows, seen in blocks:
            output[:, rows] = torch.bmm(blocks.weights(rows, seen), blocks.values[:, :seen])
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return blocks.by_position(output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        blocks = _Blocks(query, key, value, mask, ctx.causal, ctx.scale)
        slopes = blocks.by_group(outputs[0].transpose(1, 2))
        query_slopes = torch.empty_like(blocks.queries)
        key_slopes, value_slopes = (torch.zeros_like(t, dtype=torch.float32) for t in (blocks.keys, blocks.values))
        for rows, seen in blocks:
            weights = blocks.weights(rows, seen)
            value_slopes[:, :seen] += torch.bmm(weights.transpose(1, 2), slopes[:, rows])
            score_slopes = torch.bmm(slopes[:, rows], blocks.values[:, :seen].transpose(1, 2))
            score_slopes = torch._softmax_backward_data(score_slopes, weights, -1, weights.dtype)
            query_slopes[:, rows] = torch.bmm(score_slopes, blocks.keys[:, :seen])
            key_slopes[:, :seen] += torch.bmm(score_slopes.transpose(1, 2), blocks.queries[:, rows])
        of_query = blocks.by_position(query_slopes.mul_(ctx.scale)).transpose(1, 2)
        return of_query, key_slopes.view_as(key).to(key.dtype), value_slopes.view_as(value).to(value.dtype), *[None] * 3


class _Blocks:
    """Queries, keys and values as matrices, one for each sequence and key/value head, and the blocks of their rows.

    Attributes:
        queries: scaled, [matrices, positions · group, width], where `group` query heads share a key/value head and
            those of one position follow each other.  keys, values: [matrices, length, width].
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> None:
        self.batch, self.heads, self.positions, _ = query.shape
        self.kept, self.length = key.shape[1:3]
        self.group = self.heads // self.kept
        self.queries = self.by_group(query * scale)
        self.keys, self.values = key.flatten(0, 1), value.flatten(0, 1)
        self.mask, self.causal = mask, causal

    def by_group(self, tensor: Tensor) -> Tensor:
        """[batch, heads, positions, width] as [matrices, positions · group, width]."""
        return tensor.unflatten(1, (self.kept, self.group)).transpose(2, 3).flatten(2, 3).flatten(0, 1)

    def by_position(self, rows: Tensor) -> Tensor:
        """[matrices, positions · group, width] as [batch, positions, heads, width]."""
        shape = (self.batch, self.kept, self.positions, self.group, rows.shape[-1])
        return rows.view(shape).transpose(1, 2).flatten(2, 3)

    def __iter__(self) -> Iterator[tuple[slice, int]]:
        """Rows of `queries`, and how many keys they see."""
        size = max(1, ROWS // self.group)
        starts = range(0, self.positions, size)
        if self.causal:
            seen = [min(start + size, self.length) for start in starts]
        elif self.mask is None or self.positions <= size:
            seen = [self.length] * len(starts)
        else:
            shown = (self.mask > torch.finfo(self.mask.dtype).min).any(0)[0]
            last = (shown * torch.arange(1, self.length + 1, dtype=torch.int32)).amax(1)
            seen = [max(1, int(part.max())) for part in last.split(size)]
        for start, keys in zip(starts, seen, strict=True):
            yield slice(start * self.group, min(start + size, self.positions) * self.group), keys

    def weights(self, rows: slice, seen: int) -> Tensor:
        """Attention weights [matrices, rows, seen]."""
        scores = torch.bmm(self.queries[:, rows], self.keys[:, :seen].transpose(1, 2))
        first, end = rows.start // self.group, rows.stop // self.group
        shaped = scores.view(self.batch, self.kept, end - first, self.group, seen)
        if self.mask is not None:
            shaped += self.mask[:, :, first:end, None, :seen]
        elif self.causal:
            size = end - first
            later = torch.full((size, size), torch.finfo(scores.dtype).min, dtype=scores.dtype).triu_(1)
            shaped[..., first:end] += later[:, None]
        return torch.softmax(scores, -1)
