"""Perplexity: windows of a token stream, the figure, and the protocol that belongs to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsity.errors import UserError
from sparsity.sources import Source, parse_sources, read_source
from sparsity.text import token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def perplexity(
    model: nn.Module, blocks: torch.Tensor, device: torch.device, batch_size: int = 4, stride: int | None = None
) -> float:
    """Exp of the mean next-token negative log-likelihood, in nats, over blocks of token ids.

    Args:
        blocks: int64 tensor [N, T]; T - 1 tokens of each are scored.
        stride: tokens from the start of one block to the next, where blocks overlap. Blocks after the first are then
            scored on their last `stride` tokens only, so that no token counts twice.
    """
    from tqdm import tqdm

    total, count = 0.0, 0
    length = blocks.shape[1]
    fresh = length - 1 if stride is None else min(stride, length - 1)
    with torch.inference_mode():
        for start in tqdm(range(0, len(blocks), batch_size), desc="perplexity", leave=False, disable=None):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            # Row by row: 32-bit logits of a whole batch would take gigabytes for a large vocabulary.
            for row, (tokens, scores) in enumerate(zip(batch, logits, strict=True), start=start):
                scored = fresh if row else length - 1
                losses = torch.nn.functional.cross_entropy(
                    scores[-1 - scored : -1].float(), tokens[-scored:], reduction="sum"
                )
                total += losses.item()
                count += scored
    mean = total / count
    return math.inf if mean > 700 else math.exp(mean)


@dataclass(frozen=True)
class MeasuredText:
    """A text to measure, as it is named in the protocol line.

    Attributes:
        split, column: for a data set; see `read_source`.
    """

    source: Source
    split: str
    column: str

    @property
    def is_file(self) -> bool:
        return Path(self.source.spec).is_file()

    def __str__(self) -> str:
        if self.is_file:
            return Path(self.source.spec).name
        return " ".join([*filter(None, self.source.spec.split(":")), self.split, self.column])

    def read(self, tokens: int | None) -> list[str]:
        """The texts; the rows of a data set as one text, joined by blank lines as the literature joins WikiText-2.

        Args:
            tokens: how many are wanted at most; None: all.
        """
        texts = read_source(self.source, tokens, None, self.split, self.column)
        return texts if self.is_file else ["\n\n".join(texts)]


def choose_texts(sources: str, config: str | None, split: str, column: str) -> list[MeasuredText]:
    """The texts of --text.

    Args:
        config, split, column: of data sets that do not name theirs.

    Raises:
        UserError: the sources cannot be parsed.
    """
    found = []
    for source in parse_sources(sources):
        if config and ":" not in source.spec and not Path(source.spec).exists():
            source = replace(source, spec=f"{source.spec}:{config}")
        named = source.spec.split(":")
        found.append(MeasuredText(source, "" if len(named) > 2 else split, column))
    return found


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: list[MeasuredText], context: int, stride: int, limit: int | None
) -> torch.Tensor:
    """Windows [count, context] of all texts, by weight where there are several.

    Raises:
        UserError: a text is unreadable or too short.
    """
    found = []
    for text in texts:
        own = None if limit is None else max(1, round(limit * text.source.weight))
        tokens = None if own is None else context + (own - 1) * stride
        found.append(token_windows(tokenizer, text.read(tokens), context, stride, own))
    return found[0] if len(found) == 1 else torch.cat(found)


def token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int, stride: int, limit: int | None
) -> torch.Tensor:
    """Full windows of the texts' token stream, each starting `stride` tokens after the one before.

    Returns:
        int64 tensor [windows, context], a view of the stream. What follows the last full window is left out.
    """
    needed = context + (limit - 1) * stride if limit else None
    stream = token_blocks(tokenizer, texts, block_size=1, limit=needed).flatten()
    if len(stream) < context:
        raise UserError(f"the text has only {len(stream)} tokens, less than --context {context}")
    return stream.unfold(0, context, stride)


def scored_tokens(windows: torch.Tensor, stride: int) -> int:
    """How many tokens `perplexity` scores in windows [count, context] that start `stride` tokens apart."""
    count, context = windows.shape
    return context - 1 + (count - 1) * min(stride, context - 1)


def protocol_line(windows: torch.Tensor, stride: int, scored: int, source: str) -> str:
    """One line that says how a perplexity was measured; see `token_windows` for the arguments."""
    count, context = windows.shape
    kind = "blocked" if stride == context else f"sliding by {stride}"
    return f"protocol: {source}; {count} windows of {context} tokens, {kind}; {scored} tokens predicted"
