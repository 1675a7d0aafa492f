"""What restarted runs resume from: checkpoints of training, its record, and finished layers of pruning."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fuzzing import (
    REFUSED,
    attempt,
    changed,
    damaged,
    fuzz,
    json_files,
    parsed,
    planted_pickles,
    tensors_file,
    tensors_parts,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from sparsity.errors import UserError
from sparsity.files import is_number
from sparsity.sat import checkpoints, resume, saved_values, training_state

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# ------------------------------------------------------------------------------------------------- which is complete

SIZES = {"trainer_state.json": 3, "part/model.bin": 7}


@fuzz
@given(json_files(SIZES))
@example(DEEP)
@example(b"{}")
def test_marker(folder, content):
    root = folder / "marked"
    marked = root / "checkpoint-4"
    if not marked.exists():
        write(marked, {name: b"x" * size for name, size in SIZES.items()})
    write(marked, {checkpoints.MARKER: content})
    complete = checkpoints.last_complete(root) is not None
    listed = parsed(content.removeprefix(b"\xef\xbb\xbf"))
    assert complete is checkpoints.is_complete(marked)
    assert complete or listed != SIZES
    assert not complete or (isinstance(listed, dict) and listed)
    assert (marked / checkpoints.MARKER).read_bytes() == content


@fuzz
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=6))
@example("²")
@example("٢")
@example("0012")
def test_folders_of_other_names(folder, suffix):
    root = Path(tempfile.mkdtemp(dir=folder))
    (root / f"checkpoint-{suffix}").mkdir()
    found = [checkpoints.step_of(path) for path in checkpoints.checkpoint_folders(root)]
    assert found == ([int(suffix)] if re.fullmatch("[0-9]+", suffix) else [])


# --------------------------------------------------------------------------------------------- record and progress

RECORD = {"lr": 1e-5, "train_bs": 4, "num_processes": 2, "gradient_accumulation_steps": 1, "order_batch": 8, "seed": 0}


@fuzz
@given(json_files(RECORD))
@example(b"[]")
@example(json.dumps({**RECORD, "train_bs": None}).encode())
@example(json.dumps({**RECORD, "order_batch": 10**4000, "train_bs": 10**4000}).encode())
def test_record_of_the_run(folder, content):
    root = folder / "recorded"
    path = root / "run.json"
    write(root, {"run.json": content})
    if not (root / "checkpoints").exists():
        write(root / "checkpoints" / "checkpoint-4", {training_state.VALUES: b"{}"})
        checkpoints.mark_complete(root / "checkpoints" / "checkpoint-4")
    training = SimpleNamespace(
        per_device_train_batch_size=8,
        processes=1,
        gradient_accumulation_steps=1,
        dataloader_drop_last=False,
        result_dir=root,
        output_dir=root / "checkpoints",
        resume=True,
        resume_from_checkpoint=None,
    )
    found = attempt(lambda: resume.read_record(path), path)
    if found is not REFUSED:
        assert repr(found) == repr(parsed(content))
        attempt(lambda: resume.check_same_run(found, RECORD, root), root)
        batch = attempt(lambda: resume.order_batch(SimpleNamespace(training=training), samples=96), "--")
        assert batch is REFUSED or (isinstance(batch, int) and batch > 0)
    assert path.read_bytes() == content


@functools.cache
def progress() -> dict:
    from transformers import TrainerControl, TrainerState

    state = TrainerState(stateful_callbacks=[TrainerControl()], global_step=7, epoch=1.75, train_batch_size=2)
    state.log_history.append({"loss": 2.5, "step": 7})
    return vars(state)


@fuzz
@given(st.data())
def test_progress(folder, data):
    from transformers import TrainerState

    checkpoint = folder / "checkpoint-7"
    path = checkpoint / saved_values.PROGRESS
    content = data.draw(json_files(progress()))
    write(checkpoint, {path.name: content})
    if attempt(lambda: saved_values.check_progress(checkpoint), path) is not REFUSED:
        state = TrainerState.load_from_json(str(path))
        assert state.global_step == 7 and 0 <= round(state.epoch) <= 7
        assert all(7 % steps >= 0 for steps in (state.logging_steps, state.eval_steps, state.save_steps))
        assert state.best_metric is None or is_number(state.best_metric)
        assert state.best_model_checkpoint is None or not training_state.is_saved_in(Path(state.best_model_checkpoint))
        assert state.total_flos + 0.5 > 0 and "TrainerControl" in state.stateful_callbacks
        assert isinstance(state.log_history, list)
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------ what torch.save wrote


def schedule():
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.5), 2, 10)


def scaler():
    return torch.amp.GradScaler("cpu", enabled=True)


@functools.cache
def stepped(make) -> dict:
    """The state of a scheduler or scaler after some steps."""
    target = make()
    if make is schedule:
        for _ in range(3):
            target.optimizer.step()
            target.step()
    return target.state_dict()


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@st.composite
def torch_files(draw: st.DrawFn, value: dict, mark: Path) -> bytes:
    """Files of torch.save that hold nearly `value`, damaged inside or outside their zip, or planted code."""
    kind = draw(st.sampled_from(["value", "value", "damaged", "inside", "planted", "zip"]))
    if kind == "value":
        return saved(draw(changed(value)))
    if kind == "damaged":
        return draw(damaged(saved(value)))
    if kind == "planted":
        return draw(planted_pickles(mark))
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(value))) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            part = source.read(name)
            if name.endswith("data.pkl"):
                part = draw(planted_pickles(mark) if kind == "zip" else damaged(part))
            target.writestr(name, part)
    return stream.getvalue()


@pytest.mark.parametrize("make", [schedule, scaler])
@fuzz
@given(st.data())
def test_scheduler_and_scaler(folder, make, data):
    mark, path = folder / "code has run", folder / "values.pt"
    content = data.draw(torch_files(stepped(make), mark))
    path.write_bytes(content)
    target = make()
    if attempt(lambda: saved_values.load_values(path, target), path) is not REFUSED:
        found = torch.load(path, weights_only=True)
        now = target.state_dict()
        assert now.keys() == stepped(make).keys()
        assert all(repr(now[name]) == repr(found[name]) for name in now.keys() & found.keys())
        assert make is scaler or (isinstance(target.last_epoch, int) and all(map(is_number, target.base_lrs)))
    assert path.read_bytes() == content and not mark.exists()


@functools.cache
def random_states() -> dict:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}


@settings(fuzz, max_examples=200)
@given(st.data())
def test_random_states(folder, data):
    from sparsity.sat.trainer import SparseTrainer

    mark, checkpoint = folder / "code has run", folder / "checkpoint-9"
    kinds = st.sampled_from(["damaged", "planted", "missing"])
    kind = data.draw(kinds)
    if kind == "damaged":
        content = data.draw(damaged(saved(random_states())))
    elif kind == "planted":
        content = data.draw(planted_pickles(mark))
    else:
        content = saved({name: data.draw(st.sampled_from([value, 5, None])) for name, value in random_states().items()})
    write(checkpoint, {"rng_state.pth": content})
    trainer = SparseTrainer.__new__(SparseTrainer)
    trainer.args = SimpleNamespace(world_size=1, parallel_mode=None)
    attempt(lambda: trainer._load_rng_state(str(checkpoint)), checkpoint)
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------- weights and optimizer


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 4)
    model.register_buffer("_weight_mask", torch.ones(4, 4, dtype=torch.bool))
    return model, torch.optim.AdamW(model.parameters(), lr=0.25)


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    """A training state after two steps, by name of file."""
    torch.manual_seed(0)
    model, optimizer = fresh()
    for _ in range(2):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as name:
        training_state.save(Path(name), model, optimizer)
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        return {str(path.relative_to(name)): path.read_bytes() for path in files}


def tensor_file() -> str:
    (name,) = (name for name in checkpoint_files() if name.endswith(".safetensors"))
    return name


def load(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = fresh()
    training_state.load_weights(folder, model)
    training_state.load_optimizer(folder, model, optimizer)
    return model, optimizer


def check_loaded(folder: Path, found) -> None:
    """What was loaded is what the files say."""
    model, optimizer = found
    tensors, values = load_file(folder / tensor_file()), json.loads((folder / training_state.VALUES).read_text())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[f"model.{name}"], rtol=0, atol=0, equal_nan=True)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], tensors[f"optimizer.{name}.{key}"], rtol=0, atol=0, equal_nan=True)
        step = torch.tensor(float(values["state"][name]["step"]))
        torch.testing.assert_close(state["step"], step, rtol=0, atol=0, equal_nan=True)
    group, said = optimizer.param_groups[0], values["param_groups"][0]
    assert repr([group["lr"], *group["betas"]]) == repr([said["lr"], *said["betas"]])


@settings(fuzz, max_examples=300)
@given(st.data())
def test_settings_of_the_optimizer(folder, data):
    root = folder / "optimizer"
    content = data.draw(json_files(json.loads(checkpoint_files()[training_state.VALUES])))
    write(root, {**checkpoint_files(), training_state.VALUES: content})
    found = attempt(lambda: load(root), root)
    if found is not REFUSED:
        check_loaded(root, found)
    assert (root / training_state.VALUES).read_bytes() == content


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda values: values["state"]["weight"].update(step=1e308), "step"),  # more than its tensor can hold
        (lambda values: values["state"].pop("weight"), "step"),
        (lambda values: values.update(state=[]), "state"),
        (lambda values: values.update(param_groups=[]), "param_groups"),
        (lambda values: values["param_groups"][0].update(lr="0.25"), "lr"),
        (lambda values: values["param_groups"][0].pop("betas"), "betas"),
        (lambda values: values["param_groups"][0]["params"].pop(), "params"),
    ],
)
def test_settings_of_another_kind_are_refused(folder, change, named):
    values = json.loads(checkpoint_files()[training_state.VALUES])
    change(values)
    write(folder / "optimizer", {**checkpoint_files(), training_state.VALUES: json.dumps(values).encode()})
    with pytest.raises(UserError, match=f"has no valid '{named}'"):
        load(folder / "optimizer")


@pytest.mark.parametrize("release", ["older", "newer"])
def test_flags_differ_between_releases(folder, release):
    values = json.loads(checkpoint_files()[training_state.VALUES])
    for group in values["param_groups"]:
        group.pop("maximize") if release == "older" else group.update(unknown=True)
    write(folder / "optimizer", {**checkpoint_files(), training_state.VALUES: json.dumps(values).encode()})
    assert load(folder / "optimizer")[1].param_groups[0]["maximize"] is False


@st.composite
def tensor_contents(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file of tensors with a changed header, changed offsets of its pieces, or damaged bytes."""
    header, values = tensors_parts(whole)
    kind = draw(st.sampled_from(["header", "pieces", "damaged"]))
    if kind == "damaged":
        return draw(damaged(whole))
    if kind == "header":
        return tensors_file(draw(changed(header)), values)
    pieces = draw(changed(json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])))
    return tensors_file({**header, "__metadata__": {"DCP_SHARDING_INFO": json.dumps(pieces)}}, values)


@settings(fuzz, max_examples=300)
@given(st.data())
def test_tensors_of_a_checkpoint(folder, data):
    root = folder / "tensors"
    content = data.draw(tensor_contents(checkpoint_files()[tensor_file()]))
    write(root, {**checkpoint_files(), tensor_file(): content})
    found = attempt(lambda: load(root), root)
    if found is not REFUSED:
        check_loaded(root, found)
    assert (root / tensor_file()).read_bytes() == content


def piece(rows: list[list[float]], first: int) -> bytes:
    """A file of one process's rows of the weight of a linear layer."""
    values = torch.tensor(rows)
    header = {"model.weight": {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, 4 * values.numel()]}}
    pieces = {"model.weight": {"saved_offsets": [first, 0]}}
    metadata = {"DCP_SHARDING_INFO": json.dumps(pieces)}
    return tensors_file({"__metadata__": metadata, **header}, values.numpy().tobytes())


ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]


@fuzz
@given(st.integers(0, 4), st.integers(0, 4), st.integers(-1, 5), st.integers(-1, 5))
@example(2, 2, 0, 2)
@example(2, 2, 2, 2)
def test_pieces_of_two_processes(folder, first, second, begin, follow):
    """Of a tensor with a gap torch reads the rest and says nothing."""
    root = folder / "pieces"
    files = {"a": piece(ROWS[:first] or torch.zeros(0, 2).tolist(), begin)} if first else {}
    files |= {"b": piece(ROWS[4 - second :], follow)} if second else {}
    for path in (root / training_state.TENSORS).glob("*"):
        path.unlink()
    (root / training_state.TENSORS).mkdir(parents=True, exist_ok=True)
    write(root, {f"{training_state.TENSORS}/{name}.safetensors": content for name, content in files.items()})
    model = nn.Linear(2, 4, bias=False)
    found = attempt(lambda: training_state.load_weights(root, model), root)
    pieces = [(begin, first)] * bool(first) + [(follow, second)] * bool(second)
    covered = [row for start, count in sorted(pieces) for row in range(start, start + count)]
    assert (found is not REFUSED) == (covered == [0, 1, 2, 3])
    if found is not REFUSED and begin == 0 and first + second == 4:
        assert model.weight.tolist() == ROWS
