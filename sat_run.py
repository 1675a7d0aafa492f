"""A training run's place on disk and its ends: what a resumed run must share, and what failures mean."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sat_checkpoints
from processes import told_by_main
from utils import UserError, read_json, save_json

if TYPE_CHECKING:
    from sat_trainer import SparseTrainer

PIECE = 1 << 16  # bytes

# Arguments that shape the course of training: a resumed run must have the same.
COURSE = [
    "model",
    "max_length",
    "text_ratio",
    "text_length",
    "packing",
    "group_by_length",
    "num_epochs",
    "max_steps",
    "train_bs",
    "gradient_accumulation_steps",
    "lr",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "optim",
    "seed",
    "distill",
    "distill_kl",
    "distill_hidden",
    "distill_temperature",
    "mixed_precision",
]


def fingerprint(path: str | Path) -> str:
    """Hash of a file's size and of 64 pieces spread over it, which a change of weights or data can hardly miss."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for part in range(64):
            stream.seek(part * max(0, size - PIECE) // 63)
            digest.update(stream.read(PIECE))
    return digest.hexdigest()[:16]


def course_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the course of a run: arguments, the number of processes, and the content of the files named."""
    course = {name: getattr(arguments, name) for name in COURSE}
    course["num_processes"] = int(os.environ.get("WORLD_SIZE", 1))
    files = {"restore_path": arguments.restore_path, "text_path": arguments.text_path}
    if arguments.text_ratio < 1 or not arguments.text_path:
        files["data_path"] = Path(arguments.data_path) / "cnn_train.json"
    return course | {name: fingerprint(path) for name, path in files.items() if path}


def open_run(arguments: argparse.Namespace, output_dir: Path, is_main: bool) -> Path | None:
    """Prepare a new run, or find where an earlier one stopped.

    Returns:
        The checkpoint to go on from; None to start at the beginning.

    Raises:
        UserError: an earlier run is in the way, or was made with other arguments.
    """
    course = course_of(arguments)
    record, root = output_dir / "run.json", output_dir / "checkpoints"
    checkpoint = sat_checkpoints.last_complete(root)
    if checkpoint and not arguments.resume:
        raise UserError(
            f"{root} holds checkpoints of an earlier run; add --resume to go on from {checkpoint.name}, or remove the "
            "folder, or choose another --output_dir"
        )
    if checkpoint and record.is_file():
        before = read_json(record, "run record")
        for name, value in course.items():
            if before.get(name, value) != value:
                what = f"--{name} was {before[name]}, now {value}"
                if name in ("restore_path", "text_path", "data_path"):
                    what = f"the content of --{name} has changed"
                raise UserError(
                    f"--resume needs the settings of the run it goes on with: {what}; to restart remove {root}"
                )
    if is_main:
        sat_checkpoints.remove_partial(root)
        save_json(course, record)
    return checkpoint


@contextlib.contextmanager
def explain_failures(trainer: SparseTrainer, advice: Callable[[], str]) -> Iterator[None]:
    """Turn errors that all processes meet alike into one message, and a GPU out of memory into advice.

    Args:
        advice: gives a line on what to change when memory ran out.
    """
    try:
        with told_by_main(trainer.accelerator.state):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"CUDA ran out of memory at step {trainer.state.global_step + 1}. {advice()}") from error
