"""The processes of a script: joining those that torchrun or accelerate started, failing with one message, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

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


def is_main_process() -> bool:
    """True in a single process and on rank 0 of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the CUDA device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc.

    It would keep it, and where small things that live on lie between the pieces, could not use it for large ones again:
    after thirty decoder layers that was as much as was in use.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
