"""Perplexity: windows of a token stream, the figure, and the protocol that belongs to it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsity.errors import UserError, first_line
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


def read_dataset(name: str, config: str | None, split: str, column: str) -> list[str]:
    """One text: the rows of a hub data set joined by blank lines, as WikiText-2 is joined in the literature.

    Raises:
        UserError: the data set, split or column is not there, or the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many kinds: connection, missing set, missing config, bad split
        chosen = f"{name} {config or ''} {split}"
        raise UserError(f"cannot load the data set {chosen}: {first_line(error)}") from error
    if column not in rows.column_names:
        raise UserError(f"data set '{name}' has no column '{column}'; --text_column may be one of {rows.column_names}")
    return ["\n\n".join(rows[column])]


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
