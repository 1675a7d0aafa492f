"""Attention in bf16 on CPUs by blocks of plain matrix products, and for single positions.

torch's bf16 attention takes twice as long on a CPU as the matrix products it consists of. Here a block of queries, with
all query heads that share a key/value head, is multiplied only with the keys that it can see, and its scores stay in
the processor's cache until they are used. The backward pass computes them again, as in FlashAttention (Dao et al. 2022,
section 3.1), so nothing of size positions x positions is stored. Scores are rounded to bf16, as in eager attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from sparsity.devices import bf16_is_faster

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "blocked_cpu"  # the attn_implementation
BLOCK_ROWS = 192  # rows of scores in a block: its positions times the query heads of a key/value head


def use_blocked_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Have `model` compute its attention by blocks, where `device` is a CPU with bf16 instructions.

    Models that choose their attention in another way than through transformers' interface keep their own.
    """
    if device.type != "cpu" or not bf16_is_faster(device):
        return
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def blocked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in bf16 or under autocast to it by `BlockedAttention`; anything else as transformers' `sdpa` does.

    Args:
        query: [batch, heads, positions, width].  key, value: [batch, key/value heads, length, width].
        attention_mask: bool (True is visible) [batch or 1, 1, positions, length]; None shows all keys, or those that
            are not later. Any other mask is left to `sdpa`.

    Returns:
        [batch, positions, heads, width]; None for the weights.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    causal = options.get("is_causal")
    causal = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal)
    if (
        dtype != torch.bfloat16
        or query.device.type != "cpu"
        or (causal and query.shape[2] not in (1, key.shape[2]))
        or (attention_mask is not None and (attention_mask.shape[1] > 1 or attention_mask.dtype != torch.bool))
        or any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
        or options.get("position_bias") is not None
        or torch.compiler.is_compiling()
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if query.shape[2] == 1:
        return _one_position(query, key, value, attention_mask, scale), None
    with torch.autocast("cpu", enabled=False):
        return BlockedAttention.apply(query, key, value, attention_mask, causal, scale), None


def _one_position(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A step of generation; query heads that share a key/value head are several queries of it.

    torch's bf16 kernel takes ten times as long for one query as for two.
    """
    batch, heads, _, width = query.shape
    group = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], group, width)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)  # the second result is not used
    mask = None if mask is None else mask[..., : key.shape[2]]
    output = functional.scaled_dot_product_attention(queries, key, value, mask, scale=scale)
    return output[:, :, :group].reshape(batch, 1, heads, -1)


AttentionInterface.register(NAME, blocked_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class BlockedAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ + mask) · value, a block of positions at a time; no gradient for the mask."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """Args: see `blocked_attention`. Returns [batch, positions, heads, width]."""
        blocks = _Blocks(query, key, value, mask, causal, scale)
        output = torch.empty(*blocks.queries.shape[:2], value.shape[-1], dtype=value.dtype)
        for rows, seen in blocks:
            output[:, rows] = torch.bmm(torch.softmax(blocks.scores(rows, seen), -1), blocks.values[:, :seen])
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return blocks.by_position(output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        blocks = _Blocks(query, key, value, mask, ctx.causal, ctx.scale)
        output_grad = blocks.by_group(outputs[0].transpose(1, 2))
        query_grad = torch.empty_like(blocks.queries)
        key_grad, value_grad = (torch.zeros_like(t, dtype=torch.float32) for t in (blocks.keys, blocks.values))
        for rows, seen in blocks:
            scores = blocks.scores(rows, seen).requires_grad_()
            with torch.enable_grad():
                weights = torch.softmax(scores, -1)
            weight_grad = torch.bmm(output_grad[:, rows], blocks.values[:, :seen].mT)
            (score_grad,) = torch.autograd.grad(weights, scores, weight_grad)
            value_grad[:, :seen] += torch.bmm(weights.detach().mT, output_grad[:, rows])
            key_grad[:, :seen] += torch.bmm(score_grad.mT, blocks.queries[:, rows])
            query_grad[:, rows] = torch.bmm(score_grad, blocks.keys[:, :seen])
        query_grad = blocks.by_position(query_grad.mul_(ctx.scale)).transpose(1, 2)
        return query_grad, key_grad.view_as(key).to(key), value_grad.view_as(value).to(value), None, None, None


class _Blocks:
    """Queries, keys and values as matrices, one for each sequence and key/value head; iterates over blocks of rows.

    Attributes:
        queries: scaled, [matrices, positions · group, width], where `group` query heads share a key/value head and
            those of one position are adjacent.  keys, values: [matrices, length, width].
        mask: added to the scores, or None.
        ends: for each position, the first key behind all that it sees.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> None:
        self.batch, heads, self.positions, _ = query.shape
        self.num_kv_heads, length = key.shape[1:3]
        self.group, self.causal = heads // self.num_kv_heads, causal
        self.queries = self.by_group(query * scale)
        self.keys, self.values = key.flatten(0, 1), value.flatten(0, 1)
        self.mask = None
        self.ends = list(range(1, length + 1)) if causal else [length] * self.positions
        if mask is not None:
            self.mask = _hidden(~mask, query.dtype)
            last = mask.any(0)[0, :, :length] * torch.arange(1, length + 1, dtype=torch.int32)
            self.ends = last.amax(1).clamp_min_(1).tolist()

    def by_group(self, tensor: Tensor) -> Tensor:
        """[batch, heads, positions, width] as [matrices, positions · group, width]."""
        return tensor.unflatten(1, (self.num_kv_heads, self.group)).transpose(2, 3).flatten(2, 3).flatten(0, 1)

    def by_position(self, rows: Tensor) -> Tensor:
        """[matrices, positions · group, width] as [batch, positions, heads, width]."""
        shape = (self.batch, self.num_kv_heads, self.positions, self.group, rows.shape[-1])
        return rows.view(shape).transpose(1, 2).flatten(2, 3).contiguous()

    def __iter__(self) -> Iterator[tuple[slice, int]]:
        """Rows of `queries`, and how many keys they see."""
        size = max(1, BLOCK_ROWS // self.group)
        for start in range(0, self.positions, size):
            end = min(start + size, self.positions)
            yield slice(start * self.group, end * self.group), max(self.ends[start:end])

    def scores(self, rows: slice, seen: int) -> Tensor:
        """Scores [matrices, rows, seen] before the softmax."""
        scores = torch.bmm(self.queries[:, rows], self.keys[:, :seen].mT)
        first, end = rows.start // self.group, rows.stop // self.group
        shaped = scores.view(self.batch, self.num_kv_heads, end - first, self.group, seen)
        if self.mask is not None:
            shaped += self.mask[:, :, first:end, None, :seen]
        elif self.causal:
            later = torch.ones(end - first, end - first, dtype=torch.bool).triu_(1)
            shaped[..., first:end] += _hidden(later, scores.dtype)[:, None]
        return scores


def _hidden(where: Tensor, dtype: torch.dtype) -> Tensor:
    """The lowest finite value `where` keys are hidden, else 0: with -inf a row without keys would be NaN."""
    return torch.zeros(where.shape, dtype=dtype).masked_fill_(where, torch.finfo(dtype).min)
