"""Checkpoints that count only when complete, so that a run killed at any moment resumes from the last good one.

A checkpoint folder becomes valid by its last file, complete.json, which lists every other file with its size.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from sparsity.files import NOT_JSON, save_json

MARKER = "complete.json"
NAME = re.compile("checkpoint-[0-9]+")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def is_of_step(folder: Path, step: int) -> bool:
    """Whether a checkpoint may be of this step; one that was renamed may be of any."""
    return step > 0 and (not NAME.fullmatch(folder.name) or step_of(folder) == step)


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders root/checkpoint-N, complete or not, by step."""
    folders = [path for path in root.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def mark_complete(folder: Path) -> None:
    """Mark a checkpoint as complete; call it once all processes have written their files."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    save_json(sizes, folder / MARKER)


def is_complete(folder: Path) -> bool:
    """Whether all files are there that the marker lists; it lists some."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, AttributeError, *NOT_JSON):
        return False


def last_complete(root: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    whole = [folder for folder in checkpoint_folders(root) if is_complete(folder)]
    return whole[-1] if whole else None


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first: one that is killed half-way does not count as complete."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_partial(root: Path) -> None:
    """Delete what a killed run left half written."""
    for folder in checkpoint_folders(root):
        if not is_complete(folder):
            remove(folder)


def rotate(root: Path, keep: int, best: str | None) -> None:
    """Keep the newest `keep` checkpoints and the best one."""
    for folder in checkpoint_folders(root)[: -max(1, keep)]:
        if best is None or folder.name != Path(best).name:
            remove(folder)
