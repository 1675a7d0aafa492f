"""What checkpoints hold besides tensors: the Trainer's progress, and the settings of optimizer, scheduler and scaler.

The libraries that read these files put into their objects whatever they find, so it is checked before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsity.errors import UserError, first_line
from sparsity.files import is_number, is_whole_number, read_json
from sparsity.sat import checkpoints

PROGRESS = "trainer_state.json"  # transformers' own name


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a library makes of the damaged file or folder `path` into a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, KeyError, … for a damaged zip alone
        raise UserError(f"cannot read {path}: {first_line(error)}; other checkpoints are as they were") from error


def load_values(path: Path, target: Any) -> None:
    """Read the state of a scheduler or gradient scaler, as torch.save wrote it, into `target`, one of the same kind.

    Raises:
        UserError: the file is damaged, unsafe, or of another kind.
    """
    with reading(path):
        found = torch.load(path, map_location="cpu", weights_only=True)
        target.load_state_dict(taken_over(found, target.state_dict(), path))


def taken_over(found: Any, now: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of the names in `now`, as they were found in the file `path`.

    Flags that the file lacks stay as they are: releases differ in them. What only the file has is left out.

    Raises:
        UserError: a value is missing or of another kind.
    """
    if not isinstance(found, dict):
        raise damaged(path, "values by name")
    for name, value in now.items():
        right = _is_alike(found[name], value) if name in found else _is_flag(value)
        if not right:
            raise damaged(path, f"valid '{name}'")
    return {name: found.get(name, value) for name, value in now.items()}


def check_progress(folder: Path) -> None:
    """Check what a checkpoint says of the run's progress, which the Trainer takes as it is.

    Raises:
        UserError: it is damaged, or of another release of transformers.
    """
    from transformers import TrainerControl, TrainerState

    path = folder / PROGRESS
    found = read_json(path, "checkpoint")
    if not isinstance(found, dict) or not found.keys() <= vars(TrainerState()).keys():
        raise damaged(path, "valid names")
    step, epoch = found.get("global_step"), found.get("epoch")
    best, metric = found.get("best_model_checkpoint"), found.get("best_metric")
    callbacks = found.get("stateful_callbacks")
    valid = {
        "global_step": is_whole_number(step) and checkpoints.is_of_step(folder, step),
        "epoch": is_number(epoch) and is_whole_number(step) and 0 <= epoch <= step,
        "best_model_checkpoint": best is None or (isinstance(best, str) and "\0" not in best),
        "best_metric": metric is None or is_number(metric),
        "log_history": isinstance(found.get("log_history"), list),
        "stateful_callbacks": isinstance(callbacks, dict) and TrainerControl.__name__ in callbacks,
    }
    for name, least in (*((name, 1) for name in ("logging_steps", "eval_steps", "save_steps")), ("total_flos", 0)):
        valid[name] = is_number(found.get(name)) and found[name] >= least
    for name, right in valid.items():
        if not right or name not in found:
            raise damaged(path, f"valid '{name}'")


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_alike(found: Any, now: Any) -> bool:
    """Whether a value from a file can replace `now`; texts are names, which must be the same."""
    if isinstance(now, torch.Tensor):
        limits = torch.finfo(now.dtype) if now.is_floating_point() else torch.iinfo(now.dtype)
        return is_number(found) and limits.min <= found <= limits.max
    if _is_flag(now):
        return _is_flag(found)
    if isinstance(now, dict):
        return isinstance(found, dict) and found.keys() == now.keys() and all(_is_alike(found[n], now[n]) for n in now)
    if isinstance(now, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(now) and all(map(_is_alike, found, now))
    if isinstance(now, str):
        return found == now
    return is_whole_number(found) and is_number(found) if is_whole_number(now) else is_number(found)


def damaged(path: Path, lacks: str) -> UserError:
    """The error of a file of a checkpoint whose values are not as they were written."""
    return UserError(
        f"{path} has no {lacks}: it is damaged or of another release; to resume from an earlier checkpoint, remove "
        f"{path.parent}"
    )
