"""Checkpoints count only when whole."""

from __future__ import annotations

import pytest

from sparsity.sat import checkpoints


@pytest.fixture
def root(tmp_path):
    """Four whole checkpoints."""
    for step in (2, 4, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "model.bin").write_bytes(b"x" * step)
        checkpoints.mark_complete(folder)
    (tmp_path / "checkpoint-tmp").mkdir()
    return tmp_path


def steps(root):
    return [checkpoints.step_of(folder) for folder in checkpoints.checkpoint_folders(root)]


def test_last_whole_checkpoint_is_found_by_number(root):
    assert steps(root) == [2, 4, 10, 12]
    assert checkpoints.last_complete(root) == root / "checkpoint-12"
    (root / "checkpoint-12" / "part" / "model.bin").write_bytes(b"x")  # torn
    (root / "checkpoint-10" / checkpoints.MARKER).unlink()  # never finished
    assert checkpoints.last_complete(root) == root / "checkpoint-4"
    checkpoints.remove_partial(root)
    assert steps(root) == [2, 4]


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"part/absent.bin": 3}'])
def test_damaged_marker_makes_a_checkpoint_partial(root, marker):
    (root / "checkpoint-12" / checkpoints.MARKER).write_text(marker)
    assert not checkpoints.is_complete(root / "checkpoint-12")


def test_rotation_keeps_the_newest_and_the_best(root):
    checkpoints.rotate(root, 2, best=str(root / "checkpoint-2"))
    assert steps(root) == [2, 10, 12]
    checkpoints.rotate(root, 1, best=None)
    assert steps(root) == [12]


def test_no_folder_holds_no_checkpoint(tmp_path):
    assert checkpoints.last_complete(tmp_path / "absent") is None
