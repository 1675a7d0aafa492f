"""Several processes of one script, as torchrun or accelerate starts them: joining, and failing with one message."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from model_io import resolve_device
from utils import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


def start_processes(device: str) -> PartialState:
    """Join the process group that a launcher describes in the environment, or be the only process.

    Args:
        device: the value of --device; of several processes on GPUs each takes the GPU of its local rank.
    """
    from datetime import timedelta

    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    cpu = resolve_device(device).type == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    # Fast processes wait at the end for slow ones, longer than the usual ten minutes if need be.
    process = PartialState(cpu=cpu, timeout=timedelta(hours=2))
    if not process.is_main_process:
        disable_progress_bar()
    return process


@contextlib.contextmanager
def fail_together(process: PartialState) -> Iterator[None]:
    """Let a UserError in any process end all of them, told once, instead of leaving the others to wait for ever.

    Every process must enter the block, and nothing inside it may communicate with other processes.
    """
    from accelerate.utils import gather_object

    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = [text for text in gather_object([message]) if text]
    if messages and process.num_processes == 1:
        raise UserError(messages[0])
    if messages:
        if process.is_main_process:
            print(f"error: {messages[0]}", file=sys.stderr, flush=True)
        process.wait_for_everyone()  # a launcher stops everybody once one has left: first let the message out
        process.destroy_process_group()
        sys.exit(1)


@contextlib.contextmanager
def told_by_main(process: PartialState) -> Iterator[None]:
    """For work in which processes communicate and meet the same UserError: only the main process tells it."""
    try:
        yield
    except UserError:
        if process.is_main_process:
            raise
        process.destroy_process_group()
        sys.exit(1)
