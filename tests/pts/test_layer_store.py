"""Finished layers on disk: what a resumed pruning run finds again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from pruning import calibration

from sparsity.pts.layer_store import LayerStore, MatrixLog, calibration_key
from sparsity.pts.recipe import QUALITY

NAME = "model.layers.0.mlp.up_proj"
ROW = MatrixLog(NAME, [64, 32], 0.25, 0.5, 0.1, 1.5, 2.5, 100.0)


@pytest.fixture
def saved(tmp_path):
    """A store with one finished layer, and that layer's model and mask."""
    model = tiny_llama()
    mask = torch.rand(64, 32) > 0.5
    store = LayerStore(tmp_path / "pts_resume", "key")
    store.save(0, model.model.layers[0], {NAME: mask}, [ROW])
    return store, model, mask


def test_layer_comes_back_with_its_masks_and_rows(saved):
    store, model, mask = saved
    again = LayerStore(store.folder.parent, "key")
    other = tiny_llama(seed=1).model.layers[0]
    assert again.has(0) and not again.has(1)
    masks, rows = again.load(0, other)
    assert torch.equal(masks[NAME], mask) and rows == [ROW]
    expected = dict(model.model.layers[0].named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in other.named_parameters())


def cut(content: bytes) -> bytes:
    return content[:-10]


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("file", ["layer_0000.safetensors", "complete.json"])
@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"", lambda content: b"[" * 100_000])
def test_damaged_files_are_not_used(saved, file, damage):
    folder = saved[0].folder
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    store = LayerStore(folder.parent, "key")
    assert not store.has(0)
    store.save(0, tiny_llama().model.layers[0], {NAME: saved[2]}, [ROW])
    assert store.has(0)


def test_other_settings_are_not_used_nor_seen_by_a_process_that_only_reads(saved):
    folder = saved[0].folder.parent
    assert not LayerStore(folder, "another key", writer=False).has(0)
    assert LayerStore(folder, "key", writer=False).has(0)
    assert not LayerStore(folder, "another key").has(0)
    assert not list(folder.rglob("*.safetensors"))


def test_a_finished_run_leaves_nothing(saved):
    saved[0].remove()
    assert not saved[0].folder.parent.exists()


def test_store_without_a_folder_keeps_nothing():
    store, model = LayerStore(None, "key"), tiny_llama()
    layer = model.model.layers[0]
    masks = {NAME: torch.ones(64, 32).bool()}
    assert store.save(0, layer, masks, [ROW]) is masks and not store.has(0)
    store.remove()


@pytest.mark.parametrize("change", ["shrinkage", "weights", "tokens", "model", "dtype", "setting"])
def test_key_changes_with_everything_that_decides_the_result(change):
    model, batches, recipe, settings, weights = tiny_llama(), calibration(), QUALITY["balanced"], ["fp32"], [1.0] * 3
    before = calibration_key(recipe, settings, batches, model, weights)
    assert calibration_key(recipe, ["fp32"], calibration(), tiny_llama(), [1.0] * 3) == before
    if change == "shrinkage":
        recipe = replace(recipe, shrinkage=0.5)
    elif change == "weights":
        weights = [1.0, 1.0, 0.5]
    elif change == "tokens":
        batches[1]["input_ids"][0, 0] += 1
    elif change == "model":
        model = tiny_llama(seed=1)
    elif change == "dtype":
        model = tiny_llama().bfloat16()
    else:
        settings = ["bf16"]
    assert calibration_key(recipe, settings, batches, model, weights) != before
