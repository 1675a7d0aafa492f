"""Perplexity: windows of a token stream, the figure, and the protocol that belongs to it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity.attention import own_attention
from sparsity.errors import UserError
from sparsity.distributed import hide_bar, sum_over_processes
from sparsity.sources import Source, check_source, parse_sources, read_source
from sparsity.text import token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENS_AT_ONCE = 16  # whose 32-bit logits are held: small enough for a processor's cache


def total_loss(
    model: nn.Module, blocks: torch.Tensor, device: torch.device, batch_size: int = 4, stride: int | None = None
) -> tuple[float, int]:
    """Sum of the next-token negative log-likelihoods, in nats, over blocks of token ids, and how many tokens it is of.

    Args:
        blocks: int64 tensor [N, T]; T - 1 tokens of each are scored.
        stride: tokens from the start of one block to the next, where blocks overlap. Blocks after the first are then
            scored on their last `stride` tokens only, so that no token counts twice.
    """
    from tqdm import tqdm

    total, count = 0.0, 0
    length = blocks.shape[1]
    fresh = length - 1 if stride is None else min(stride, length - 1)
    bar = tqdm(total=len(blocks), desc="perplexity", unit="window", leave=False, disable=hide_bar())
    with torch.inference_mode(), own_attention(), bar:
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, (tokens, scores) in enumerate(zip(batch, logits, strict=True), start=start):
                scored = fresh if row else length - 1
                total += _sequence_loss(scores[-1 - scored : -1], tokens[-scored:])
                count += scored
            bar.update(len(batch))
    return total, count


def _sequence_loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Sum of -log softmax(logits)[token] in 32 bits, for logits [T, vocabulary] and tokens [T]."""
    parts = zip(logits.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE), strict=True)
    losses = [torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum") for part, wanted in parts]
    return torch.stack(losses).sum().item()


def perplexity(
    model: nn.Module, blocks: torch.Tensor, device: torch.device, batch_size: int = 4, stride: int | None = None
) -> float:
    """Exp of the mean next-token negative log-likelihood; see `total_loss` for the arguments."""
    return exp_mean(*total_loss(model, blocks, device, batch_size, stride))


def exp_mean(total: float, count: int) -> float:
    """Perplexity from a sum of losses in nats; infinite where it exceeds what a float holds."""
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
        raise UserError(
            f"the text has only {len(stream)} tokens, less than a window of {context}; give more or a smaller window"
        )
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


@dataclass(frozen=True)
class Task:
    """A perplexity to measure: windows [count, context] that start `stride` tokens apart, and how to name them."""

    windows: torch.Tensor
    stride: int
    protocol: str


def make_task(
    tokenizer: PreTrainedTokenizerBase, texts: list[MeasuredText], context: int, stride: int, limit: int | None
) -> Task:
    """Read the texts and cut them into at most `limit` windows, shared out by weight where there are several.

    Raises:
        UserError: several texts without a limit, or one that is unreadable or too short.
    """
    if len(texts) > 1 and not limit:
        raise UserError(
            "several texts are weighted by windows; say how many windows in all with --max_blocks "
            "(--perplexity_blocks of eval.py)"
        )
    for text in texts:
        check_source(text.source)
    windows = windows_of(tokenizer, texts, context, stride, limit)
    scored = scored_tokens(windows, stride)
    return Task(windows, stride, protocol_line(windows, stride, scored, ", ".join(map(str, texts))))


def named_tasks(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[str], context: int, limit: int | None
) -> dict[str, Task]:
    """The tasks of options NAME=SOURCE, in blocks of `context` tokens, by name.

    Raises:
        UserError: an option of another form, a name twice, or as `make_task`.
    """
    sources: dict[str, str] = {}
    for pair in pairs:
        name, separator, source = pair.partition("=")
        if not separator or not name or not source:
            raise UserError(f"--perplexity_data takes NAME=SOURCE, found '{pair}', e.g. papers=heldout.jsonl")
        if name in sources:
            raise UserError(f"--perplexity_data names '{name}' twice; every text needs a name of its own")
        sources[name] = source
    return {
        name: make_task(tokenizer, choose_texts(source, None, "test", "text"), context, context, limit)
        for name, source in sources.items()
    }


def measure(
    model: nn.Module, task: Task, device: torch.device, batch_size: int, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """The perplexity of a task with its protocol, as the scripts save it.

    Args:
        share: (index, count): of `count` processes, which all call this, each takes every count-th window. Windows may
            not overlap then.

    Raises:
        UserError: the figure is not a number.
    """
    start = time.perf_counter()
    index, processes = share
    mine = task.windows[index::processes]
    total, tokens = total_loss(model, mine, device, batch_size, task.stride) if len(mine) else (0.0, 0)
    if processes > 1:
        total, tokens = sum_over_processes(torch.tensor([total, tokens], dtype=torch.double, device=device)).tolist()
    value = exp_mean(total, int(tokens))
    if value != value:
        raise UserError(
            "the perplexity is not a number: the model overflows in this precision; try --dtype bf16 or fp32"
        )
    return {
        "perplexity": value,
        "tokens": int(tokens),
        "windows": len(task.windows),
        "context": task.windows.shape[1],
        "stride": task.stride,
        "protocol": task.protocol,
        "seconds": time.perf_counter() - start,
    }


def result_line(found: dict[str, Any], name: str = "") -> str:
    """What the scripts print of a result of `measure`."""
    of = f" ({name})" if name else ""
    return f"perplexity{of}: {found['perplexity']:.4f} ({found['tokens']} tokens in {found['seconds']:.1f} s)"
