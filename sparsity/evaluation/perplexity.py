"""Perplexity: windows of a token stream, the figure, and the protocol that belongs to it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sparsity.distributed import hide_bar
from sparsity.errors import UserError
from sparsity.files import is_file, path_exists
from sparsity.sources import Source, check_source, read_source
from sparsity.text import token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_AT_ONCE = 16  # tokens whose fp32 logits are computed together: few enough for a processor's cache


def choose_texts(items: Sequence[str]) -> dict[str, Source]:
    """The texts of --text by name; a single text needs none and is then called "".

    Args:
        items: [NAME=]SOURCE; an existing path may contain "=".

    Raises:
        UserError: a name is missing or given twice, or a source is a path that does not exist.
    """
    texts: dict[str, Source] = {}
    for item in items:
        name, separator, spec = item.partition("=")
        if path_exists(item) or not separator:
            name, spec = "", item
        if (not name and len(items) > 1) or name in texts or not spec:
            raise UserError(f"--text takes one SOURCE, or several NAME=SOURCE with different names; got '{item}'")
        texts[name] = Source(spec)
        check_source(texts[name])
    return texts


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    context: int,
    stride: int,
    limit: int | None,
    split: str = "test",
    column: str | None = None,
) -> torch.Tensor:
    """Full windows of a text's token stream, each starting `stride` tokens after the one before.

    The rows of a data set are one text, joined by blank lines as the literature joins WikiText-2.

    Args:
        limit: most windows; None: all.
        split, column: of a data set; see `read_source`.

    Returns:
        int64 tensor [windows, context], a view of the stream. What follows the last full window is left out.

    Raises:
        UserError: the text does not fill one window.
    """
    needed = context + (limit - 1) * stride if limit else None
    texts = read_source(source, needed, None, split, column, tokenizer)
    if not is_file(source.spec):
        texts = ["\n\n".join(texts)]
    stream = token_blocks(tokenizer, texts, block_size=1, limit=needed).flatten()
    if len(stream) < context:
        raise UserError(
            f"the text has only {len(stream)} tokens, less than a window of {context}; give more or a smaller window"
        )
    return stream.unfold(0, context, stride)


def protocol_line(
    windows: torch.Tensor, stride: int, scored: int, source: Source, split: str, column: str | None
) -> str:
    """One line that says how a perplexity was measured; see `windows_of` for the arguments."""
    parts = [*[*source.spec.split(":"), split][:3], column]
    text = Path(source.spec).name if is_file(source.spec) else " ".join(filter(None, parts))
    count, context = windows.shape
    kind = "blocked" if stride == context else f"sliding by {stride}"
    return f"protocol: {text}; {count} windows of {context} tokens, {kind}; {scored} tokens predicted"


def measure(
    model: nn.Module, windows: torch.Tensor, device: torch.device, batch_size: int, stride: int
) -> dict[str, Any]:
    """The perplexity of windows [count, context] that start `stride` tokens apart, as eval_ppl.py saves it.

    Raises:
        UserError: the figure is not a number.
    """
    start = time.perf_counter()
    total, tokens = total_loss(model, windows, device, batch_size, stride)
    if math.isnan(total):
        raise UserError(
            "the perplexity is not a number: the model overflows in this precision; try --dtype bf16 or fp32"
        )
    return {
        "perplexity": torch.tensor(total / tokens, dtype=torch.float64).exp().item(),  # infinite above e**709
        "tokens": tokens,
        "windows": len(windows),
        "context": windows.shape[1],
        "stride": stride,
        "seconds": time.perf_counter() - start,
    }


def total_loss(
    model: nn.Module, blocks: torch.Tensor, device: torch.device, batch_size: int, stride: int
) -> tuple[float, int]:
    """Sum of the next-token negative log-likelihoods in nats over blocks of token ids, and the number of tokens.

    Args:
        blocks: int64 tensor [N, T]; T - 1 tokens of each are scored.
        stride: tokens from the start of one block to the next. Where blocks overlap, those after the first are scored
            on their last `stride` tokens only, so that no token counts twice.
    """
    from tqdm import tqdm

    total, count, length = 0.0, 0, blocks.shape[1]
    bar = tqdm(total=len(blocks), desc="perplexity", unit="window", leave=False, disable=hide_bar())
    with torch.inference_mode(), bar:
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, (tokens, scores) in enumerate(zip(batch, logits, strict=True), start=start):
                scored = min(stride, length - 1) if row else length - 1
                pairs = (scores[-1 - scored : -1].split(TOKENS_AT_ONCE), tokens[-scored:].split(TOKENS_AT_ONCE))
                losses = [
                    functional.cross_entropy(part.float(), target, reduction="sum")
                    for part, target in zip(*pairs, strict=True)
                ]
                total += torch.stack(losses).sum().item()
                count += scored
            bar.update(len(batch))
    return total, count
