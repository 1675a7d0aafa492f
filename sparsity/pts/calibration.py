"""The calibration set: the texts that it is drawn from, the weight of each, and the part of each process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity.errors import UserError
from sparsity.sources import Source, draw_sequences

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedModel

DEFAULT_SOURCES = "cnn_dailymail=0.3 c4=0.15 codeparrot/codeparrot-clean-train=0.15 self=0.4"


@dataclass
class CalibrationSet:
    """The texts to calibrate on, and how they are cut.

    Attributes:
        sources: plain texts with weights; none for pruning without text.
        size: number of sequences, shared by weight.  length: tokens per sequence.
        batch_size: sequences per forward pass.  seed: order in which texts are drawn.
    """

    sources: list[Source]
    size: int
    length: int
    batch_size: int
    seed: int = 0


def split_batches(
    sources: list[Source], blocks: list[torch.Tensor], batch_size: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Batches of sequences, none with those of two sources, and the weight of each batch's tokens, 1 on average.

    A source counts by its weight, however long it is.

    Args:
        blocks: of each source, int64 [sequences, length].

    Returns:
        batches, int64 [batch_size, length], the last of a source may be smaller; weights.
    """
    batches: list[torch.Tensor] = []
    token_weights: list[float] = []
    total = sum(map(len, blocks))
    for source, block in zip(sources, blocks, strict=True):
        parts = block.split(batch_size)
        batches += parts
        token_weights += [source.weight * total / len(block)] * len(parts)
    return batches, token_weights


def load_calibration_set(
    calibration: CalibrationSet,
    model_name: str,
    model: PreTrainedModel,
    device: torch.device,
    process: PartialState,
    trust_remote_code: bool = False,
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Calibration batches on every process; see `split_batches`.

    Args:
        model: the dense model of that name, which writes self-generated text.

    Returns:
        batches {"input_ids": int64 [batch_size, length]} of full sequences; the weight of each batch's tokens. Both are
        empty without sources.

    Raises:
        UserError: no text, or less than one sequence of it.
    """
    from sparsity.generated_text import generate_text
    from sparsity.models import load_tokenizer

    if not calibration.sources:
        return [], []
    length, seed = calibration.length, calibration.seed
    with process.main_process_first():  # the others then find the generated text in the cache
        tokenizer = load_tokenizer(model_name, trust_remote_code)

        def write(count: int) -> torch.Tensor:
            return generate_text(model_name, tokenizer, count, length, device, seed, trust_remote_code, dense=model)

        blocks = draw_sequences(tokenizer, calibration.sources, calibration.size, length, seed, write)
    batches, token_weights = split_batches(calibration.sources, blocks, calibration.batch_size)
    return [{"input_ids": batch} for batch in batches], token_weights


def share_of_process(items: list, process: PartialState) -> list:
    """This process's part of the calibration batches or of their weights, as many as every other's.

    Raises:
        UserError: there are fewer batches than processes.
    """
    world = process.num_processes
    if 0 < len(items) < world:
        raise UserError(f"{len(items)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return items[: len(items) // world * world][process.process_index :: world]
