"""What a restarted training run reads of its earlier self: sealed checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import damaged, fuzz, json_files, parsed
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.files import SEAL, seal
from sparsity.sat import checkpoints

FILES = {"trainer_state.json": b'{"global_step": 4}', "training_state/shard-1.safetensors": b"tensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(st.data())
def test_a_checkpoint_counts_only_as_it_was_written(folder, data):
    root = folder / "sealed"
    shutil.rmtree(root, ignore_errors=True)
    checkpoint = root / "checkpoint-4"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    seal(checkpoint)
    assert checkpoints.last_complete(root) == checkpoint
    path = checkpoint / data.draw(st.sampled_from([*FILES, SEAL]))
    before = path.read_bytes()
    seal_content = json.loads((checkpoint / SEAL).read_text())
    content = data.draw(json_files(seal_content) if path.name == SEAL else damaged(before))
    path.write_bytes(content)
    if checkpoints.last_complete(root) is None:
        assert content != before
    elif path.name == SEAL:  # it may list fewer files
        listed = parsed(content)
        assert isinstance(listed, dict) and listed and listed.items() <= seal_content.items()
    else:
        assert content == before
    assert path.read_bytes() == content


@fuzz
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=6))
@example("²")
@example("٢")
@example("0012")
def test_folders_of_other_names(folder, suffix):
    root = Path(tempfile.mkdtemp(dir=folder))
    (root / f"checkpoint-{suffix}").mkdir()
    steps = [checkpoints.step_of(path) for path in checkpoints.checkpoint_folders(root)]
    assert steps == ([int(suffix)] if re.fullmatch("[0-9]+", suffix) else [])
