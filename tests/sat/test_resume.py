"""What a resumed training run must share with the run it continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsity.errors import UserError
from sparsity.files import SEAL, read_json, seal
from sparsity.sat import resume
from sparsity.sat.arguments import (
    DataArguments,
    DistillationArguments,
    ModelArguments,
    SatArguments,
    SparseTrainingArguments,
)
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate


@pytest.fixture
def make(tmp_path, state_path, data_dir):
    """Options of a run in `tmp_path`/out, some of them changed."""

    def arguments(data=None, **training):
        return SatArguments(
            ModelArguments("a model", str(state_path)),
            DataArguments(data_path=str(data or data_dir)),
            DistillationArguments(),
            SparseTrainingArguments(output_dir=str(tmp_path / "out"), **training),
        )

    (tmp_path / "out").mkdir()
    return arguments


def add_checkpoint(args, step: int) -> Path:
    folder = Path(args.training.output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"weights")
    seal(folder)
    return folder


def open_run(args, template: PromptTemplate = DEFAULT_TEMPLATE) -> Path | None:
    """Find the checkpoint and open the run as finetune.py does."""
    checkpoint = resume.find_checkpoint(args)
    resume.open_run(args, template, checkpoint)
    return checkpoint


def test_new_run_is_recorded_and_starts_at_the_beginning(make):
    args = make()
    torn = add_checkpoint(args, 3)
    (torn / SEAL).unlink()
    assert open_run(args) is None
    record = read_json(args.training.result_dir / "run.json", "record")
    assert (record["lr"], record["model"], record["max_length"]) == (2e-05, "a model", 1024)
    assert record["batch"] == {"samples": 4, "processes": 1, "accumulated": 1, "order": 4}
    assert not {"workers", "logging_steps", "train_bs"} & record.keys()
    assert not torn.exists()


def test_earlier_checkpoints_are_only_used_on_request(make):
    args = make()
    folder = add_checkpoint(args, 4)
    with pytest.raises(UserError, match="add --resume to continue from checkpoint-4"):
        open_run(args)
    assert open_run(make(resume=True)) == folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-3}, "--lr was 2e-05, now 0.001"),
        ({"optim": "adafactor"}, "--optim was adamw_torch_fused, now adafactor"),
        ({"max_steps": 7}, "--max_steps was -1, now 7"),
        ({"seed": 3}, "--seed was 0, now 3"),
    ],
)
def test_other_settings_are_refused_by_name(make, changed, message):
    open_run(make())
    args = make(resume=True, **changed)
    add_checkpoint(args, 4)
    with pytest.raises(UserError, match=f"{message}; to start over, remove"):
        open_run(args)
    assert read_json(args.training.result_dir / "run.json", "record")["lr"] == 2e-05


def test_other_content_of_a_file_is_noticed(make, data_dir, tmp_path):
    open_run(make())
    (tmp_path / "data").mkdir()
    records = json.loads((data_dir / "cnn_train.json").read_text())
    (tmp_path / "data" / "cnn_train.json").write_text(json.dumps(records))
    args = make(data=tmp_path / "data", resume=True)
    folder = add_checkpoint(args, 4)
    assert open_run(args) == folder  # the same content in another place
    (tmp_path / "data" / "cnn_train.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match="the content of --data_path has changed"):
        open_run(args)


def test_resuming_from_a_named_checkpoint(make, tmp_path):
    first = add_checkpoint(make(), 2)
    add_checkpoint(make(), 4)
    assert open_run(make(resume_from_checkpoint=str(first))) == first
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        open_run(make(resume_from_checkpoint=str(tmp_path)))


def test_another_prompt_is_refused(make):
    open_run(make())
    args = make(resume=True)
    add_checkpoint(args, 4)
    with pytest.raises(UserError, match="the prompt template has changed"):
        open_run(args, PromptTemplate("{instruction}", ""))


@pytest.mark.parametrize("content", ["{", ""])
def test_a_damaged_record_is_refused(make, content):
    args = make(resume=True)
    checkpoint = add_checkpoint(args, 4)
    (args.training.result_dir / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json"):
        resume.order_batch(args, checkpoint, 100)


# -------------------------------------------------------------------------------------------- number of processes


def resumed_on(make, processes: int, per_device: int, accumulated: int):
    args = make(resume=True, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulated)
    args.training.processes = processes
    return args


@pytest.fixture
def eight_processes(make):
    """The record of a run of 8 processes with 2 samples each, and a checkpoint of it."""
    args = make(per_device_train_batch_size=2)
    args.training.processes, args.training.order_batch = 8, 16
    open_run(args)
    return add_checkpoint(args, 4)


@pytest.mark.parametrize("split", [(8, 2, 1), (4, 2, 2), (4, 4, 1), (1, 1, 16), (16, 1, 1), (1, 16, 1)])
def test_other_processes_see_the_same_steps_in_the_same_order(make, eight_processes, split):
    args = resumed_on(make, *split)
    args.training.order_batch = resume.order_batch(args, eight_processes, samples=100)
    assert args.training.order_batch == 16
    args.training.schedule(100, evaluates=False)
    assert args.training.max_steps == 3 * 6 and args.training.samples_per_epoch(100) == 96
    assert open_run(args) == eight_processes


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((4, 2, 1), r"optimizer steps of 16 samples \(--train_bs 2 on 8 process.*got 8; change --train_bs or"),
        ((2, 5, 1), "got 10"),
    ],
)
def test_other_steps_are_refused(make, eight_processes, split, message):
    with pytest.raises(UserError, match=message):
        resume.order_batch(resumed_on(make, *split), eight_processes, samples=100)


def test_batches_that_do_not_divide_an_epoch_are_refused(make):
    args = make(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    open_run(args)
    checkpoint = add_checkpoint(args, 4)
    other = resumed_on(make, 2, 4, 1)
    assert resume.order_batch(other, checkpoint, samples=96) == 4
    with pytest.raises(UserError, match="does not divide the 100 samples of an epoch"):
        resume.order_batch(other, checkpoint, samples=100)
