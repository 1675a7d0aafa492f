"""Checkpoints of training, which any number of processes can read and which count only once they are sealed.

Every process writes the tensors that it holds, and torch.distributed.checkpoint reshards them for the processes that
load them. Tensors are stored as safetensors and the rest as JSON: the default format of torch.distributed.checkpoint
unpickles its index, which can run code. The seal (see `files.seal`) is written last, so that a run killed at any moment
resumes from the last complete checkpoint, and it exposes files that have changed since.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.distributed import is_main_process
from sparsity.errors import UserError, first_line, warn
from sparsity.files import SEAL, is_sealed, read_json, save_json
from sparsity.sat.fsdp import model_state, tied_names

NAME = re.compile("checkpoint-[0-9]+")
TENSORS, VALUES = "training_state", "training_state.json"  # in the folder of a checkpoint
FILE_BYTES = 1 << 28  # per process, approximately: every file is assembled in memory

# ---------------------------------------------------------------------------------------------------------- folders


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders root/checkpoint-N, complete or not, by step."""
    folders = [path for path in root.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def last_complete(root: Path) -> Path | None:
    """The last checkpoint whose files are as they were written; warns about later ones that are damaged."""
    for folder in reversed(checkpoint_folders(root)):
        if is_sealed(folder):
            return folder
        if (folder / SEAL).is_file():
            warn(f"checkpoint {folder} is damaged and is skipped: its files have changed since they were written")
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint, its seal first, so that it does not count as complete if this is interrupted."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_partial(root: Path) -> None:
    """Delete checkpoints that a killed run did not finish writing."""
    for folder in checkpoint_folders(root):
        if not (folder / SEAL).is_file():
            remove(folder)


def rotate(newest: Path, keep: int, best: str | None) -> None:
    """Delete old checkpoints: keep `newest`, the `keep - 1` before it, any after it, and the best one."""
    until_newest = [folder for folder in checkpoint_folders(newest.parent) if step_of(folder) <= step_of(newest)]
    for folder in until_newest[:-keep]:
        if best is None or folder.name != Path(best).name:
            remove(folder)


# ---------------------------------------------------------------------------------------------------------- content


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trained_only: bool = False) -> None:
    """Write the weights of `model` and the state of `optimizer` into `folder`; all processes must call it.

    Args:
        trained_only: leave out frozen weights, which come from the model and its sparse state.

    Raises:
        OSError, UserError: a process could not write its files.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    # The weights first: that reshards what an evaluation has left gathered.
    tensors = {f"model.{name}": tensor for name, tensor in model_state(model, trained_only).items()}
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    moments, values = _split(state)
    tensors |= moments
    writer = dcp.HuggingFaceStorageWriter(
        path=str(folder / TENSORS), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True
    )
    with _plain_errors(f"cannot write {folder}"):
        dcp.save(tensors, storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    if is_main_process():
        save_json({"state": values, "param_groups": state["param_groups"]}, folder / VALUES)


def load_weights(folder: Path, model: nn.Module, trained_only: bool = False) -> None:
    """Read the weights of a checkpoint into `model`, sharded in any way; all processes must call it.

    Args:
        trained_only: see `save`.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = model_state(model, trained_only)
    _read(folder, {f"model.{name}": tensor for name, tensor in weights.items()})
    weights |= {name: weights[first] for name, first in tied_names(model).items() if first in weights}
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer state of a checkpoint, for the parameters of `model`; all processes must call it.

    Raises:
        UserError: the checkpoint belongs to another optimizer.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)  # before the first step, of zeros
    _read(folder, _split(state)[0])
    saved = read_json(folder / VALUES, "checkpoint")
    for weight, contents in saved["state"].items():
        for name, content in contents.items():
            value = state["state"][weight][name]
            is_tensor = isinstance(value, torch.Tensor)
            state["state"][weight][name] = torch.full_like(value, content) if is_tensor else content
    state["param_groups"] = saved["param_groups"]
    set_optimizer_state_dict(model, optimizer, state)


def _split(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The arrays of an optimizer state, by name in the checkpoint, and its other values, by weight and name.

    The others, a step count for example, are equal on all processes.
    """
    arrays: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for weight, contents in state["state"].items():
        values[weight] = {}
        for name, value in contents.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                arrays[f"optimizer.{weight}.{name}"] = value
            else:
                values[weight][name] = value.item() if isinstance(value, torch.Tensor) else value
    return arrays, values


def _file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file for each tensor; equal on all processes."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + filled // (FILE_BYTES * processes)
        filled += tensor.numel() * tensor.dtype.itemsize
    return numbers


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read the checkpoint's values into `tensors`, in place."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(path=str(folder / TENSORS))
    with _plain_errors(f"cannot read {folder}"):
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Raise the failure of any process, which torch.distributed.checkpoint wraps in a BaseException, as an Exception.

    A failed write or lack of memory is raised as it is, anything else as a UserError that begins with `what`.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a single process saves
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise UserError(f"{what}: {first_line(cause)}; other checkpoints are unchanged") from error
