"""The processes of a script: joining those that torchrun or accelerate started, and failing together."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsity.devices import resolve_device
from sparsity.errors import UserError, memory_shortage

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

WAIT_SECONDS = 2 * 60 * 60  # fast processes may wait for slow ones longer than the usual ten minutes


def start_processes(device: str) -> PartialState:
    """Join the process group that a launcher describes in the environment, or be the only process.

    Args:
        device: the value of --device; of several processes on GPUs each takes the GPU of its local rank.
    """
    from datetime import timedelta

    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    cpu = resolve_device(device).type == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    process = PartialState(cpu=cpu, timeout=timedelta(seconds=WAIT_SECONDS))
    if not process.is_main_process:
        disable_progress_bar()
    return process


@contextlib.contextmanager
def fail_together(process: PartialState) -> Iterator[None]:
    """Let a UserError or lack of memory in any process end all, reported once, and leave none waiting forever.

    Every process must enter the block, and nothing inside it may communicate with other processes.
    """
    from accelerate.utils import gather_object

    message = None
    try:
        yield
    except Exception as error:
        if process.num_processes == 1:
            raise
        if shortage := memory_shortage(error):
            message = (
                f"{shortage} in process {process.process_index}; start fewer processes, or choose smaller settings"
            )
        elif isinstance(error, UserError):
            message = str(error)
        else:
            raise
    messages = [text for text in gather_object([message]) if text]
    if messages:
        if process.is_main_process:
            print(f"error: {messages[0]}", file=sys.stderr, flush=True)
        process.wait_for_everyone()  # a launcher stops all processes once one has left: print the message first
        process.destroy_process_group()
        sys.exit(1)


@contextlib.contextmanager
def report_on_main(process: PartialState) -> Iterator[None]:
    """For work in which processes communicate and all meet the same UserError: only the main process reports it."""
    try:
        yield
    except UserError:
        if process.is_main_process:
            raise
        process.destroy_process_group()
        sys.exit(1)


def have_joined() -> bool:
    """Whether this is one of several processes that have joined their group; does not import torch."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def is_first_report() -> bool:
    """Whether no other process has reported a failure of this run before.

    Before the processes have joined, the first one of each machine reports.
    """
    if not have_joined():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    import torch.distributed as dist

    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except Exception:  # process 0, which keeps the store, has failed and reported it
        return dist.get_rank() == 0


def warn(message: str) -> None:
    """Print one line of warning to stderr, on the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """True in a single process and on rank 0 of several."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def hide_bar() -> bool | None:
    """For tqdm's `disable`: no progress bar in all but the main process, nor (None) where the output is no terminal."""
    return None if is_main_process() else True


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; all must call it."""
    from accelerate.utils import reduce

    return reduce(tensor, "sum")


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all must call it."""
    import torch

    return sum_over_processes(torch.tensor(float(flag), device=device)).item() > 0
