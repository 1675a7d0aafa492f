"""Weights and optimizer state in a checkpoint: every process writes what it holds, and any number of them reads it.

torch.distributed.checkpoint cuts the tensors anew for the processes that load them; a run on one process has the same
files. Tensors are kept as safetensors and everything else as JSON: the usual format of torch.distributed.checkpoint
unpickles its index, which can run code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.errors import UserError, first_line
from sparsity.files import is_file, read_json, save_json
from sparsity.distributed import is_main_process
from sparsity.sat.saved_values import damaged, taken_over
from sparsity.sat.sharding import plain_name

TENSORS, VALUES = "training_state", "training_state.json"  # in the folder of a checkpoint
FILE_BYTES = 1 << 28  # per process, about: a file is put together in memory, fresh memory for large ones takes long


def is_saved_in(folder: Path) -> bool:
    """Whether a checkpoint is of this format; earlier releases wrote those of transformers' Trainer."""
    return is_file(folder / VALUES)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, trained_only: bool = False) -> None:
    """Write the weights of `model` and the state of `optimizer` into `folder`; all processes must call it.

    Args:
        trained_only: leave out frozen weights, which come from the model and its sparse state.

    Raises:
        OSError, UserError: a process could not write its files; of several processes, all raise a UserError.
    """
    import torch.distributed.checkpoint as dcp

    tensors = _named_weights(model, trained_only)
    values: dict[str, Any] = {"state": {}}
    optimizer_state = _optimizer_state(model, optimizer)
    for weight, state in optimizer_state["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.size():
                tensors[f"optimizer.{weight}.{name}"] = value
            else:  # a count of steps, for example, which all processes know
                values["state"].setdefault(weight, {})[name] = value.item() if torch.is_tensor(value) else value
    values["param_groups"] = optimizer_state["param_groups"]
    writer = dcp.HuggingFaceStorageWriter(
        path=str(folder / TENSORS), fqn_to_index_mapping=_files_of(tensors), save_distributed=True
    )
    with _quiet(), _plain_errors(f"cannot write {folder}", keep_os_errors=_processes() == 1):
        dcp.save(tensors, storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    if is_main_process():
        save_json(values, folder / VALUES)


def load_weights(folder: Path, model: nn.Module, trained_only: bool = False) -> None:
    """Read the weights of a checkpoint into `model`, whichever way it is sharded; all processes must call it.

    Args:
        trained_only: see `save`.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    named = _named_weights(model, trained_only)
    _read(folder, named)
    weights: dict[str, Any] = {name.removeprefix("model."): tensor for name, tensor in named.items()}
    weights |= {name: weights[first] for name, first in _tied_names(model).items() if first in weights}
    with _quiet():
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer state of a checkpoint, for the parameters of `model`; all processes must call it.

    Raises:
        UserError: the checkpoint is damaged, or of another optimizer.
    """
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _optimizer_state(model, optimizer)
    named: dict[str, Any] = {}
    for weight, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.size():
                named[f"optimizer.{weight}.{name}"] = value
    _read(folder, named)
    _read_values(folder / VALUES, state)
    with _quiet():
        set_optimizer_state_dict(model, _unwrapped(optimizer), state)


def _read_values(path: Path, state: dict[str, Any]) -> None:
    """Read what an optimizer has besides tensors into `state`, the state of an optimizer of the same kind."""
    found = read_json(path, "checkpoint")
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        raise damaged(path, "valid 'state'")
    for weight, values in state["state"].items():
        single = {n: v for n, v in values.items() if not (isinstance(v, torch.Tensor) and v.size())}
        for name, value in taken_over(found["state"].get(weight, {}), single, path).items():
            now = single[name]
            values[name] = torch.full_like(now, value) if isinstance(now, torch.Tensor) else value
    groups, own = found.get("param_groups"), state["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise damaged(path, "valid 'param_groups'")
    state["param_groups"] = [taken_over(group, now, path) for group, now in zip(groups, own, strict=True)]


def _named_weights(model: nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    """Weights and masks as "model.NAME", shards as they are; of tied weights only the first."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    left_out = set(_tied_names(model))
    if trained_only:
        left_out |= {plain_name(name) for name, weight in model.named_parameters() if not weight.requires_grad}
    with _quiet():
        state: dict[str, Any] = get_model_state_dict(model)
    return {f"model.{name}": tensor for name, tensor in state.items() if name not in left_out}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several → the first name."""
    first: dict[nn.Parameter, str] = {}
    names = [(plain_name(name), weight) for name, weight in model.named_parameters(remove_duplicate=False)]
    return {name: first[weight] for name, weight in names if first.setdefault(weight, name) != name}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": weight name → {name → value}, "param_groups": […]}; zeros before the first step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    with _quiet():
        return get_optimizer_state_dict(model, _unwrapped(optimizer))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to; the same on every process."""
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + filled // (FILE_BYTES * _processes())
        filled += tensor.size().numel() * tensor.dtype.itemsize  # of a ShardedTensor too, which has little more
    return numbers


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    class Planner(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> dcp.LoadPlan:
            assert self.metadata is not None  # a checkpoint's headers, which have been read
            for name, tensor in self.state_dict.items():
                _check_whole(name, tensor, self.metadata.state_dict_metadata.get(name))
            return super().create_local_plan()

    reader = dcp.HuggingFaceStorageReader(path=str(folder / TENSORS))
    with _quiet(), _plain_errors(f"cannot read {folder}"):
        dcp.load(tensors, storage_reader=reader, planner=Planner(), no_dist=not torch.distributed.is_initialized())


def _check_whole(name: str, tensor: torch.Tensor, saved: Any) -> None:
    """Refuse what torch would read in part or convert: a tensor that lacks a piece, or is of another shape or dtype.

    Args:
        saved: torch's TensorStorageMetadata; its pieces are rows, as all kinds of FSDP cut them.
    """
    if saved is None:
        raise ValueError(f"it has no '{name}'")
    if saved.size != tensor.size() or saved.properties.dtype != tensor.dtype:
        raise ValueError(
            f"'{name}' is {saved.properties.dtype} {list(saved.size)} and should be {tensor.dtype} "
            f"{list(tensor.size())}"
        )
    end, pieces = 0, [piece for piece in saved.chunks if saved.size and piece.sizes.numel()]
    for piece in sorted(pieces, key=lambda piece: piece.offsets[0]):
        if piece.offsets[0] != end or any(piece.offsets[1:]) or piece.sizes[1:] != saved.size[1:]:
            raise ValueError(f"the pieces of '{name}' do not fit together")
        end += piece.sizes[0]
    if pieces and end != saved.size[0]:
        raise ValueError(f"'{name}' lacks a piece")


@contextmanager
def _plain_errors(what: str, keep_os_errors: bool = False) -> Iterator[None]:
    """Raise the failure of any process, which torch.distributed.checkpoint wraps in a BaseException, as a UserError.

    Args:
        keep_os_errors: leave an OSError as it is; its message names the file, and scripts end with one line on it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception) or (keep_os_errors and isinstance(cause, OSError)):
            raise cause from None
        raise UserError(f"{what}: {first_line(cause)}; other checkpoints are as they were") from error


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch that a single process saves alone, and that FSDP1's states will be withdrawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
