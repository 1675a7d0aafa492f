"""Modelopt states and safetensors files that are damaged, foreign or hostile: read right, or refused in one line."""

from __future__ import annotations

import copy
import functools
import io
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import sparse_matrix
from fuzzing import REFUSED, Planted, attempt, changed, damaged, odd_values, planted_pickles, spelled, tensors_file
from hypothesis import given
from hypothesis import strategies as st

from sparsity.files import safetensors_files
from sparsity.inspection import inspect_path
from sparsity.modelopt_state import check_state_fits, is_mask, load_state, restore_sparse
from sparsity.quantized import read_dequantized

LAYER = "model.layers.0.mlp.up_proj"


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@functools.cache
def dense_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


@functools.cache  # not a fixture, whose value would be printed with every failing example
def intact_state() -> dict:
    """The state of a sparse model of one small layer, as modelopt makes it."""
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts

    model = mts.sparsify(copy.deepcopy(dense_model()), "sparse_magnitude")
    for module in model.modules():
        if getattr(module, "is_sparse", False):
            module.set_mask(sparse_matrix(*module.weight.shape) != 0)
    return {"modelopt_state": mto.modelopt_state(model), "model_state_dict": dict(model.state_dict())}


@functools.cache
def intact_file() -> bytes:
    return saved(intact_state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_reading(path: Path, content: bytes):
    """Write a state and read it as the scripts do; returns it, or REFUSED."""
    path.write_bytes(content)
    state = attempt(lambda: load_state(path), path)
    reports = attempt(lambda: list(inspect_path(path)), path)
    assert state is not REFUSED or reports is REFUSED
    for name, tensor in state["model_state_dict"].items() if state is not REFUSED else ():
        assert not is_mask(name) or tensor.dtype == torch.bool
    return state


@given(st.data())
def test_damaged_states(folder, data):
    """Damage in the file, or in the pickle of an intact zip file, where only the unpickler is left to notice it."""
    if data.draw(st.booleans()):
        content = data.draw(damaged(intact_file()))
    else:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(intact_file())) as source, zipfile.ZipFile(stream, "w") as target:
            for name in source.namelist():
                part = source.read(name)
                target.writestr(name, data.draw(damaged(part)) if name.endswith("data.pkl") else part)
        content = stream.getvalue()
    check_reading(folder / "state.pth", content)


@given(st.data())
def test_planted_code_never_runs(folder, data):
    mark = folder / "code has run"
    key = data.draw(st.sampled_from(["modelopt_state", "model_state_dict", "other"]))
    inside = saved({**intact_state(), key: {**intact_state().get(key, {}), LAYER: Planted(mark)}})
    content = data.draw(st.one_of(planted_pickles(mark), st.just(inside)))
    assert check_reading(folder / "state.pth", content) is REFUSED and not mark.exists()


OTHER_TENSORS = [
    torch.zeros(8, 8),
    torch.zeros(8, 8, dtype=torch.bool),
    torch.ones(8, 8, dtype=torch.int64),
    torch.full((8, 8), float("nan")),
    torch.zeros(4, 8, dtype=torch.bool),
    torch.zeros(8, 8, 1),
    torch.zeros(()),
    torch.zeros(0, 8),
    torch.zeros(8, 8).to_sparse(),
    torch.zeros(8, 8, device="meta"),
]
OTHER_KEYS = ["x._weight_mask", "_weight_mask", f"{LAYER}._weight_mask.", "a\nb", 0, None, ""]


@given(st.data())
def test_states_with_other_tensors(folder, data):
    tensors = dict(intact_state()["model_state_dict"])
    name = data.draw(st.sampled_from([f"{LAYER}.weight", f"{LAYER}._weight_mask", *tensors]))
    value = tensors.pop(name)
    key = data.draw(st.sampled_from([name, name, *OTHER_KEYS]))
    tensors[key] = data.draw(st.one_of(st.just(value), st.sampled_from(OTHER_TENSORS), odd_values))
    path = folder / "state.pth"
    state = check_reading(path, saved({**intact_state(), "model_state_dict": tensors}))
    if state is not REFUSED:
        model = copy.deepcopy(dense_model()).to("meta")
        if attempt(lambda: check_state_fits(state, model, path), path) is not REFUSED:
            fitting = {name: t.shape for name, t in state["model_state_dict"].items() if not is_mask(name)}
            assert fitting == {name: t.shape for name, t in model.state_dict().items()}


@pytest.mark.parametrize("value", [5, [], {}, None, "text"], ids=repr)
@pytest.mark.parametrize("part", ["modelopt_state", "model_state_dict"])
def test_parts_of_another_kind(folder, part, value):
    path = folder / "state.pth"
    path.write_bytes(saved({**intact_state(), part: value}))
    assert attempt(lambda: restore_sparse(copy.deepcopy(dense_model()), path), path) is REFUSED


HEADER = {
    "a.weight": {"dtype": "I8", "shape": [2, 4], "data_offsets": [0, 8]},
    "a.weight_scale": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    "a.input_scale": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
}


@given(
    st.one_of(damaged(tensors_file(HEADER, bytes(20))), st.builds(tensors_file, changed(HEADER), st.just(bytes(20))))
)
def test_safetensors_files(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    reports = attempt(lambda: list(inspect_path(path)), path)
    assert reports is REFUSED or all(len(report.shape) == 2 for report in reports)
    attempt(lambda: read_dequantized(path, torch.float32), path)


@given(changed({"metadata": {"total_size": 160}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
def test_weight_index(folder, content):
    root = folder / "sharded"
    root.mkdir(exist_ok=True)
    for path in (root / "one.safetensors", root / "two.safetensors", folder / "one.safetensors"):
        path.write_bytes(b"")
    (root / "model.safetensors.index.json").write_bytes(spelled(content))
    files = attempt(lambda: safetensors_files(root), root)
    assert files is REFUSED or all(path.parent == root and path.is_file() for path in files)
