"""Attention where torch's own kernels do not serve: in bfloat16 on CPUs, and for beams that share their prompt.

On CPUs torch's bfloat16 kernel takes twice the time of plain products, or more. Here positions are taken a block at a
time. A block of queries, with all query heads that share a key/value head, is multiplied only with the keys that it can
see, and its scores stay in the processor's cache until they are used up. The backward pass computes them again, as in
FlashAttention (Dao et al. 2022, section 3.1), so that nothing of the size positions x positions is kept. Scores are
rounded to bfloat16, as in transformers' eager attention.

In beam search, on any device, all beams of an example are queries of the same keys of their prompt; see
`sparsity.kv_cache.BeamLayer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.kv_cache import buffer_of, mark_attended, prompt_of

ROWS = 192  # of scores in a block: one for each of its positions and each query head of a key/value head


@contextmanager
def own_attention() -> Iterator[None]:
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
    if torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    plain, of_beams = _is_plain(attention_mask, options), prompt_of(key) is not None
    if plain or of_beams:
        mark_attended(key, value)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if of_beams:
        if plain and query.shape[2] == 1:
            return _of_beams(query, key, value, attention_mask, scale), None
        key, value = _with_prompt(key, query), _with_prompt(value, query)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type != "cpu" or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]
    causal = options.get("is_causal")
    causal = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else bool(causal))
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
        return _apply(query, keys, values, Rule(added, [keys.shape[2]], False, scale))
    group = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], group, width)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)  # the second result is not used
    output = F.scaled_dot_product_attention(queries, key, value, mask, scale=scale)
    return output[:, :, :group].reshape(batch, 1, heads, -1)


def _of_beams(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of a step of beam search, [batch * beams, 1, heads, width], with keys and values of a `BeamLayer`.

    Those of a prompt are read once for all its beams.
    """
    (keys, new_keys), (values, new_values) = map(_prompt_and_buffer, (key, value))
    batch, kept, known, width = keys.shape
    beams, group, room = query.shape[0] // batch, query.shape[1] // kept, new_keys.shape[1]
    queries = (query.to(keys.dtype) * scale).view(batch, beams, kept, group, width)
    scores = queries.new_empty(batch, kept, beams, group, known + room)
    of_prompt = torch.bmm(queries.transpose(1, 2).reshape(batch * kept, beams * group, width), keys.flatten(0, 1).mT)
    scores[..., :known] = of_prompt.view(batch, kept, beams, group, known)
    of_new = torch.bmm(queries.reshape(-1, group, width), new_keys.mT)
    scores[..., known:] = of_new.view(batch, beams, kept, group, room).transpose(1, 2)
    length = known + key.shape[2]
    scores[..., length:] = torch.finfo(scores.dtype).min
    if mask is not None:
        added = _added(mask[..., :length], scores.dtype)
        scores[..., :length] += added.view(-1, 1, beams if len(added) > 1 else 1, 1, length)
    weights = torch.softmax(scores, -1)
    output = torch.bmm(weights[..., :known].reshape(batch * kept, beams * group, known), values.flatten(0, 1))
    of_new = torch.bmm(weights[..., known:].transpose(1, 2).reshape(-1, group, room), new_values)
    output = output.view(batch, kept, beams, group, -1).transpose(1, 2)
    return (output + of_new.view_as(output)).reshape(len(query), 1, kept * group, -1)


def _prompt_and_buffer(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Of keys or values of a `BeamLayer`: [batch, heads, prompt, width], [batch * beams * heads, room, width]."""
    prompt, buffer = prompt_of(tensor), buffer_of(tensor)
    assert prompt is not None and buffer is not None
    return prompt, buffer.flatten(0, 1)


def _with_prompt(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values of a `BeamLayer` as those of any other layer, [batch * beams, heads, length, width]."""
    prompt = prompt_of(tensor)
    assert prompt is not None
    return torch.cat([prompt.repeat_interleave(len(query) // len(prompt), 0), tensor], 2)


class Rule(NamedTuple):
    """Which keys a position sees, and the factor of its scores.

    Attributes:
        mask: added to the scores, [batch or 1, 1, positions, length]; None: all keys, or if `causal` no later one.
        ends: behind which key each position sees none.
    """

    mask: Tensor | None
    ends: list[int]
    causal: bool
    scale: float


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    positions, length = query.shape[2], key.shape[2]
    ends = list(range(1, length + 1)) if causal else [length] * positions
    added, ends = (None, ends) if mask is None else _shown(mask, query.dtype)
    return _apply(query, key, value, Rule(added, ends, causal, scale))


def _apply(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return BlockedAttention.apply(query, key, value, rule)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores; the lowest finite value hides, so that a row without keys has no NaN."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _shown(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """What `Rule` takes of a mask. Layers share a mask, so it carries the result."""
    known: tuple[Tensor, list[int]] | None = getattr(mask, "shown", None)
    if known is not None and known[0].dtype == dtype:
        return known
    added = _added(mask, dtype)
    shown = mask if mask.dtype == torch.bool else added > torch.finfo(dtype).min
    last = shown.any(0)[0] * torch.arange(1, mask.shape[-1] + 1, dtype=torch.int32)
    known = added, last.amax(1).clamp_min_(1).tolist()
    setattr(mask, "shown", known)  # noqa: B010
    return known


class BlockedAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ + mask) · value, a block of positions at a time, for no gradient of the mask."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Args: see `attention`. Returns [batch, positions, heads, width]."""
        blocks = _Blocks(query, key, value, rule)
        output = torch.empty(*blocks.queries.shape[:2], value.shape[-1], dtype=value.dtype)
        for rows, seen in blocks:
            output[:, rows] = torch.bmm(torch.softmax(blocks.scores(rows, seen), -1), blocks.values[:, :seen])
        ctx.save_for_backward(query, key, value)
        ctx.rule = rule
        return blocks.by_position(output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        blocks = _Blocks(query, key, value, ctx.rule)
        slopes = blocks.by_group(outputs[0].transpose(1, 2))
        of_queries = torch.empty_like(blocks.queries)
        of_keys, of_values = (torch.zeros_like(t, dtype=torch.float32) for t in (blocks.keys, blocks.values))
        for rows, seen in blocks:
            scores = blocks.scores(rows, seen).requires_grad_()
            with torch.enable_grad():
                weights = torch.softmax(scores, -1)
            of_weights = torch.bmm(slopes[:, rows], blocks.values[:, :seen].transpose(1, 2))
            (of_scores,) = torch.autograd.grad(weights, scores, of_weights)
            of_values[:, :seen] += torch.bmm(weights.detach().transpose(1, 2), slopes[:, rows])
            of_keys[:, :seen] += torch.bmm(of_scores.transpose(1, 2), blocks.queries[:, rows])
            of_queries[:, rows] = torch.bmm(of_scores, blocks.keys[:, :seen])
        of_query = blocks.by_position(of_queries.mul_(ctx.rule.scale)).transpose(1, 2)
        return of_query, of_keys.view_as(key).to(key.dtype), of_values.view_as(value).to(value.dtype), None


class _Blocks:
    """Queries, keys and values as matrices, one for each sequence and key/value head, and the blocks of their rows.

    Attributes:
        queries: scaled, [matrices, positions · group, width], where `group` query heads share a key/value head and
            those of one position follow each other.  keys, values: [matrices, length, width].
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> None:
        self.batch, self.heads, self.positions, _ = query.shape
        self.kept = key.shape[1]
        self.group = self.heads // self.kept
        self.queries = self.by_group(query * rule.scale)
        self.keys, self.values = key.flatten(0, 1), value.flatten(0, 1)
        self.rule = rule

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
        for start in range(0, self.positions, size):
            end = min(start + size, self.positions)
            yield slice(start * self.group, end * self.group), max(self.rule.ends[start:end])

    def scores(self, rows: slice, seen: int) -> Tensor:
        """What the softmax of [matrices, rows, seen] is taken of."""
        scores = torch.bmm(self.queries[:, rows], self.keys[:, :seen].transpose(1, 2))
        first, end = rows.start // self.group, rows.stop // self.group
        shaped = scores.view(self.batch, self.kept, end - first, self.group, seen)
        if self.rule.mask is not None:
            shaped += self.rule.mask[:, :, first:end, None, :seen]
        elif self.rule.causal:
            size = end - first
            later = torch.full((size, size), torch.finfo(scores.dtype).min, dtype=scores.dtype).triu_(1)
            shaped[..., first:end] += later[:, None]
        return scores
