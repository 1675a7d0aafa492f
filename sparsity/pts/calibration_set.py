"""The calibration set: which texts it is drawn from, how much each counts, and the share of each process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsity.errors import UserError
from sparsity.distributed import warn
from sparsity.sources import CALIBRATION_TEXT, SELF, Source, draw_sequences, shares

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

DEFAULT_SOURCES = f"{CALIBRATION_TEXT}=0.6,{SELF}=0.4"


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    size: int,
    length: int,
    batch_size: int,
    seed: int,
    write: Callable[[int], torch.Tensor],
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Calibration sequences of all sources, no batch with those of two.

    Args:
        write: from a number of sequences to the model's own text, int64 [sequences, length].

    Returns:
        batches {"input_ids": int64 [batch_size, length]} of full sequences, the last of a source may be smaller; for
        each batch, what its tokens count, 1 on average: a source counts by its weight, however long it is.

    Raises:
        UserError: no text, or less than one sequence of it.
    """
    blocks = []
    for source, count in zip(sources, shares(sources, size), strict=True):
        if source.spec == SELF:
            blocks.append(write(count))
            continue
        blocks.append(draw_sequences(tokenizer, source, count, length, seed))
        if len(blocks[-1]) < count:
            counts = ", which count as much" if len(sources) > 1 else ""
            warn(f"{source.spec} gives {len(blocks[-1])} sequences of {length}, not {count}{counts}")
    total = sum(map(len, blocks))
    batches, token_weights = [], []
    for source, found in zip(sources, blocks, strict=True):
        parts = found.split(batch_size)
        batches += [{"input_ids": part} for part in parts]
        token_weights += [source.weight * total / len(found)] * len(parts)
    return batches, token_weights


def share_of_process(items: list, process: PartialState) -> list:
    """This process's part of the calibration batches or of their weights, as many as every other's.

    Raises:
        UserError: there are fewer batches than processes.
    """
    world = process.num_processes
    if len(items) < world:
        raise UserError(f"{len(items)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return items[: len(items) // world * world][process.process_index :: world]
