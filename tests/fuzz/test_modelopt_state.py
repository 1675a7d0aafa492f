"""States of modelopt, and weights in safetensors: what verifying, restoring, exporting and reporting read."""

from __future__ import annotations

import copy
import functools
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import sparse_matrix
from fuzzing import (
    REFUSED,
    Planted,
    attempt,
    changed,
    damaged,
    fuzz,
    odd_values,
    planted_pickles,
    spelled,
    tensors_file,
    tensors_parts,
)
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.files import safetensors_files
from sparsity.inspection import inspect_path
from sparsity.modelopt_state import apply_state, check_state_fits, is_mask, load_state, require_masks
from sparsity.quantized import read_dequantized
from sparsity.reporting.results import Run, count_zeros, table_rows

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


def dense():
    return copy.deepcopy(dense_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@functools.cache  # no fixture, whose value would be printed with every failing example
def whole_state() -> dict:
    """The state of a sparse model of one small layer, as modelopt makes it."""
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts

    model = mts.sparsify(dense(), "sparse_magnitude")
    for module in model.modules():
        if getattr(module, "is_sparse", False):
            module.set_mask(sparse_matrix(*module.weight.shape) != 0)
    return {"modelopt_state": mto.modelopt_state(model), "model_state_dict": dict(model.state_dict())}


@functools.cache
def whole_file() -> bytes:
    return saved(whole_state())


def check_reading(path: Path):
    """Read a state as every script does; returns it, or REFUSED."""

    def read():
        found = load_state(path)
        require_masks(found["model_state_dict"], path)
        return found

    found = attempt(read, path)
    reports = attempt(lambda: list(inspect_path(path)), path)
    assert found is not REFUSED or reports is REFUSED
    if found is not REFUSED:
        for name, tensor in found["model_state_dict"].items():
            assert isinstance(name, str) and isinstance(tensor, torch.Tensor)
            assert not is_mask(name) or tensor.dtype == torch.bool
    if reports is not REFUSED:
        assert table_rows([Run("a", path, sparsity=count_zeros(path))])
    return found


@fuzz
@given(st.data())
def test_damaged_states(folder, data):
    content = data.draw(damaged(whole_file()))
    path = folder / "state.pth"
    path.write_bytes(content)
    check_reading(path)
    assert path.read_bytes() == content


@fuzz
@given(st.data())
def test_damaged_pickle_inside_a_whole_state(folder, data):
    """The zip file around it is sound, so that only the unpickler is left to notice."""
    path = folder / "state.pth"
    with zipfile.ZipFile(io.BytesIO(whole_file())) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, data.draw(damaged(content)) if name.endswith("data.pkl") else content)
    check_reading(path)


@fuzz
@given(st.data())
def test_planted_code_never_runs(folder, data):
    mark = folder / "code has run"
    path = folder / "state.pth"
    kind = data.draw(st.sampled_from(["plain", "zip", "inside", "name"]))
    if kind == "plain":
        path.write_bytes(data.draw(planted_pickles(mark)))
    elif kind == "inside":
        part = data.draw(st.sampled_from(["modelopt_state", "model_state_dict"]))
        key = data.draw(st.sampled_from([LAYER, "x._weight_mask", "modelopt_version", "modelopt_state_dict"]))
        path.write_bytes(saved({**whole_state(), part: {**whole_state()[part], key: Planted(mark)}}))
    elif kind == "name":
        path.write_bytes(saved({**whole_state(), data.draw(st.text(max_size=3)): Planted(mark)}))
    else:
        with zipfile.ZipFile(path, "w") as target:
            target.writestr("archive/data.pkl", data.draw(planted_pickles(mark)))
            target.writestr("archive/version", "3")
    assert check_reading(path) is REFUSED and not mark.exists()


OTHER_TENSORS = [
    torch.zeros(8, 8),
    torch.zeros(8, 8, dtype=torch.bool),
    torch.ones(8, 8, dtype=torch.uint8),
    torch.ones(8, 8, dtype=torch.int64),
    torch.ones(8, 8, dtype=torch.complex64),
    torch.full((8, 8), float("nan")),
    torch.zeros(8, 8).to(torch.float8_e4m3fn),
    torch.zeros(8, 8, dtype=torch.uint16),
    torch.zeros(8, 4),
    torch.zeros(4, 8, dtype=torch.bool),
    torch.zeros(8, 8, 1),
    torch.zeros(8),
    torch.zeros(()),
    torch.zeros(0, 8),
    torch.zeros(8, 0, dtype=torch.bool),
    torch.zeros(8, 8).to_sparse(),
    torch.zeros(8, 8, device="meta"),
    torch.zeros(8, 8).expand(9, 8, 8),
    torch.nn.Parameter(torch.zeros(8, 8)),
]
OTHER_KEYS = ["x._weight_mask", "_weight_mask", "._weight_mask", f"{LAYER}._weight_mask.", "a\nb", 0, None, ""]
values = st.one_of(odd_values, st.sampled_from(OTHER_TENSORS))
keys = st.sampled_from(OTHER_KEYS)


@st.composite
def altered(draw: st.DrawFn) -> dict:
    """The state with entries that are missing, renamed, added or of another kind."""
    tensors = dict(whole_state()["model_state_dict"])
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([f"{LAYER}.weight", f"{LAYER}._weight_mask", *tensors]))
        kind = draw(st.sampled_from(["value", "value", "value", "missing", "key", "more"]))
        if kind == "value":
            tensors[name] = draw(values)
        elif kind == "missing":
            tensors.pop(name, None)
        elif kind == "key":
            tensors[draw(keys)] = tensors.pop(name, None)
        else:
            tensors[draw(keys)] = draw(values)
    return {**whole_state(), "model_state_dict": tensors}


@fuzz
@given(st.data())
def test_states_with_other_tensors(folder, data):
    path = folder / "state.pth"
    torch.save(data.draw(altered()), path)
    found = check_reading(path)
    if found is not REFUSED:
        model = dense().to("meta")
        if attempt(lambda: check_state_fits(found["model_state_dict"], model, path), path) is not REFUSED:
            fitting = {name: t.shape for name, t in found["model_state_dict"].items() if not is_mask(name)}
            assert fitting == {name: t.shape for name, t in model.state_dict().items()}


@pytest.mark.parametrize("value", [5, [], {}, None, "text"], ids=repr)
@pytest.mark.parametrize("part", ["modelopt_state", "model_state_dict"])
def test_parts_of_another_kind(folder, part, value):
    path = folder / "state.pth"
    torch.save({**whole_state(), part: value}, path)
    assert attempt(lambda: apply_state(dense(), load_state(path), path), path) is REFUSED
    if part == "model_state_dict":
        assert check_reading(path) is REFUSED


@fuzz
@given(st.data())
def test_states_that_modelopt_restores(folder, data):
    path = folder / "state.pth"
    own = copy.deepcopy(whole_state()["modelopt_state"])
    mode, content = own["modelopt_state_dict"][0]
    kind = data.draw(st.sampled_from(["content", "modes", "all"]))
    if kind == "content":
        own["modelopt_state_dict"] = [(mode, data.draw(changed(json.loads(json.dumps(content, default=str)))))]
    elif kind == "modes":
        own["modelopt_state_dict"] = data.draw(changed([[mode, {}]]))
    else:
        own = data.draw(changed(json.loads(json.dumps(own, default=str))))
    torch.save({**whole_state(), "modelopt_state": own}, path)
    found = attempt(lambda: apply_state(dense(), load_state(path), path), path)
    if found is not REFUSED:
        expected = whole_state()["model_state_dict"]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


# -------------------------------------------------------------------------------------------------------- safetensors


HEADER = {
    "__metadata__": {"format": "pt"},
    f"{LAYER}.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "model.layers.0.mlp.down_proj.weight": {"dtype": "F16", "shape": [4, 4], "data_offsets": [128, 160]},
}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F16": 16}
BITS |= {"BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
BITS |= {"F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F31": 31, "f32": 32, "": 8}


def matrix_file(kind: str, shape: list[int], size: int | None = None) -> bytes:
    """A file of one tensor, by default with exactly the bytes that it needs."""
    if size is None:
        size = shape[0] * shape[1] * BITS[kind] // 8
    header = {"w.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}
    return tensors_file(header, bytes(min(size, 10_000)))


kinds = st.sampled_from(sorted(BITS))
shapes = st.sampled_from([[4, 8], [4, 0], [0, 4], [1, 16], [2**32, 2**32], [32], [-1, 4], [4, 4, 2], []])
sizes = st.sampled_from([0, 1, 4, 16, 24, 32, 64, 128, 256, 2**62])


@fuzz
@given(
    st.one_of(
        damaged(tensors_file(HEADER, bytes(160))),
        st.builds(tensors_file, changed(HEADER), st.just(bytes(160))),
        st.builds(tensors_file, st.just(HEADER), st.just(bytes(160)), st.integers(-(2**63), 2**63)),
        st.builds(matrix_file, kinds, shapes, sizes),
        st.builds(matrix_file, kinds, st.sampled_from([[4, 8], [8, 0], [16, 64]])),
    )
)
@example(matrix_file("F4", [4, 8]))
@example(matrix_file("F32", [8, 0]))
def test_safetensors_files(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    found = attempt(lambda: list(inspect_path(path)), path)
    if found is not REFUSED:
        header = tensors_parts(content)[0]
        assert found and all(list(report.shape) == header[report.name]["shape"] for report in found)
        assert table_rows([Run("a", path, sparsity=count_zeros(path))])
    attempt(lambda: read_dequantized(path, torch.float32), path)
    assert path.read_bytes() == content


SCALED = {
    "a.weight": {"dtype": "I8", "shape": [2, 4], "data_offsets": [0, 8]},
    "a.weight_scale": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    "a.input_scale": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
}


@fuzz
@given(changed(SCALED, most=3))
@example({**SCALED, "a.weight_scale": {"dtype": "F32", "shape": [1, 2, 1], "data_offsets": [8, 16]}})
def test_quantized_weights(folder, header):
    path = folder / "quantized.safetensors"
    path.write_bytes(tensors_file(header, bytes(20)))
    found = attempt(lambda: read_dequantized(path, torch.float32), path)
    if found is not REFUSED:
        weights, scales = found
        assert all(list(tensor.shape) == header[name]["shape"] for name, tensor in weights.items())
        assert all(f"{layer}.weight" in weights and "weight_scale" in scales[layer] for layer in scales)


@fuzz
@given(changed({"metadata": {"total_size": 160}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
@example({"weight_map": {"a": 5}})
@example({"weight_map": {"a": "../one.safetensors"}})
def test_weight_index(folder, content):
    root = folder / "sharded"
    root.mkdir(exist_ok=True)
    for path in (root / "one.safetensors", root / "two.safetensors", folder / "one.safetensors"):
        path.write_bytes(b"")
    (root / "model.safetensors.index.json").write_bytes(spelled(content))
    found = attempt(lambda: safetensors_files(root), root)
    assert found is REFUSED or (found and all(path.parent == root and path.is_file() for path in found))
