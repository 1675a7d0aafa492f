"""The processes of a script that torchrun or accelerate started: joining them, and what they share."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from sparsity.devices import resolve_device

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

WAIT_SECONDS = 2 * 60 * 60  # for slow processes; the default of ten minutes is too short


def start_processes(device: str) -> PartialState:
    """Join the process group that a launcher describes in the environment, or be the only process.

    Args:
        device: the value of --device; each of several processes on GPUs takes the GPU of its local rank.
    """
    from datetime import timedelta

    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    cpu = resolve_device(device).type == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    process = PartialState(cpu=cpu, timeout=timedelta(seconds=WAIT_SECONDS))
    if not process.is_main_process:
        disable_progress_bar()
    return process


def have_joined() -> bool:
    """Whether this is one of several processes that have joined their group; does not import torch."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def leave_group_and_exit() -> None:
    """End this process with success if it has joined a group: leave that, run the exit handlers, and exit.

    Device meshes keep the group alive in torch, with threads that may release a tensor while Python is finalized. That
    would abort the process.
    """
    if have_joined():
        import torch.distributed as dist

        dist.destroy_process_group()
        atexit._run_exitfuncs()  # of wandb, for example
        sys.stdout.flush()
        os._exit(0)


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


def is_main_process() -> bool:
    """Whether this is the only process, or rank 0 of several."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def hide_bar() -> bool | None:
    """For tqdm's `disable`: a progress bar only on the main process, and only (None) if the output is a terminal."""
    return None if is_main_process() else True


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; all must call it."""
    from accelerate.utils import reduce

    return reduce(tensor, "sum")


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all must call it."""
    import torch

    return sum_over_processes(torch.tensor(float(flag), device=device)).item() > 0
