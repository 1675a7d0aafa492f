"""The calibration set: which text is read, and its share of each process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsity.errors import UserError
from sparsity.processes import warn
from sparsity.sources import Source, read_source, shares
from sparsity.text import sample_blocks

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase


def load_calibration(
    tokenizer: PreTrainedTokenizerBase, sources: list[Source], size: int, length: int, batch_size: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Batches {"input_ids": int64 [batch_size, length]} of full sequences; the last one may be smaller.

    Raises:
        UserError: no text, or less than one sequence of it.
    """
    drawn = []
    for source, count in zip(sources, shares(sources, size), strict=True):
        if count:
            texts = read_source(source, count * length, seed)
            drawn.append(sample_blocks(tokenizer, texts, length, count, seed))
    blocks = torch.cat(drawn)
    if len(blocks) < size:
        warn(f"the text gives {len(blocks)} sequences of {length}, not {size}")
    return [{"input_ids": batch} for batch in blocks.split(batch_size)]


def share_of_process(batches: list[dict[str, torch.Tensor]], process: PartialState) -> list[dict[str, torch.Tensor]]:
    """This process's part of the calibration batches, as many as every other's.

    Raises:
        UserError: there are fewer batches than processes.
    """
    world = process.num_processes
    if len(batches) < world:
        raise UserError(f"{len(batches)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return batches[: len(batches) // world * world][process.process_index :: world]
