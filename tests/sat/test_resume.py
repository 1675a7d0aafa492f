"""What a resumed training run must share with the run it continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sparsity.errors import UserError
from sparsity.files import read_json, save_json
from sparsity.sat import checkpoints, resume, training_state
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


def add_checkpoint(args, step: int, file: str = "model.safetensors") -> Path:
    folder = Path(args.training.output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"weights")
    checkpoints.mark_complete(folder)
    return folder


def legacy_digest(path: Path) -> str:
    """As earlier releases named a file's content in run.json."""
    content, piece = path.read_bytes(), 1 << 16
    digest = hashlib.sha256(str(len(content)).encode())
    for part in range(64):
        start = part * max(0, len(content) - piece) // 63
        digest.update(content[start : start + piece])
    return digest.hexdigest()[:16]


@pytest.fixture
def legacy_record(state_path, data_dir):
    """run.json as an earlier release wrote it, with the default options."""
    record = {"model": "a model", "max_length": 1024, "text_ratio": 0.5, "text_length": None, "packing": False}
    record |= {"group_by_length": True, "num_epochs": 3, "max_steps": None, "train_bs": 4}
    record |= {"gradient_accumulation_steps": 1, "lr": 2e-05, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03}
    record |= {"weight_decay": 0.1, "adam_beta2": 0.999, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "seed": 0}
    record |= {"distill": False, "distill_kl": 1.0, "distill_temperature": 1.0}
    record |= {"mixed_precision": "auto", "num_processes": 1}
    return record | {"restore_path": legacy_digest(state_path), "data_path": legacy_digest(data_dir / "cnn_train.json")}


def test_settings_are_those_of_earlier_releases(make, legacy_record):
    settings = json.loads(json.dumps(resume.run_settings(make(), DEFAULT_TEMPLATE)))
    assert {name: value for name, value in settings.items() if name not in resume.EARLIER} == legacy_record


def test_earlier_record_without_newer_keys_resumes(make, legacy_record):
    args = make(resume=True, dataloader_drop_last=False, freeze_embeddings=False)  # which were the defaults then
    folder = add_checkpoint(args, 4)
    for name in ("max_grad_norm", "adam_beta2", "num_processes"):
        del legacy_record[name]
    save_json(legacy_record, args.training.result_dir / "run.json")
    resume.check_same_run(legacy_record, resume.run_settings(args, DEFAULT_TEMPLATE), args.training.result_dir)
    assert resume.open_run(args, DEFAULT_TEMPLATE, is_main=True) == folder
    assert read_json(args.training.result_dir / "run.json", "record")["max_grad_norm"] == 1.0


def test_new_run_is_recorded_and_starts_at_the_beginning(make):
    args = make()
    torn = add_checkpoint(args, 3)
    (torn / checkpoints.MARKER).unlink()
    assert resume.open_run(args, DEFAULT_TEMPLATE, is_main=False) is None
    assert not (args.training.result_dir / "run.json").exists() and torn.exists()
    assert resume.open_run(args, DEFAULT_TEMPLATE, is_main=True) is None
    assert read_json(args.training.result_dir / "run.json", "record")["lr"] == 2e-05
    assert not torn.exists()


def test_earlier_checkpoints_are_only_used_when_asked_for(make):
    args = make()
    folder = add_checkpoint(args, 4)
    with pytest.raises(UserError, match="add --resume to continue from checkpoint-4"):
        resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)
    assert resume.open_run(make(resume=True), DEFAULT_TEMPLATE, is_main=True) == folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-3}, "--lr was 2e-05, now 0.001"),
        ({"optim": "adafactor"}, "--optim was adamw_torch_fused, now adafactor"),
        ({"max_steps": 7}, "--max_steps was None, now 7"),
        ({"seed": 3}, "--seed was 0, now 3"),
    ],
)
def test_other_settings_are_refused_by_name(make, changed, message):
    resume.open_run(make(), DEFAULT_TEMPLATE, is_main=True)
    args = make(resume=True, **changed)
    add_checkpoint(args, 4)
    with pytest.raises(UserError, match=f"{message}; to start over, remove"):
        resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)
    assert read_json(args.training.result_dir / "run.json", "record")["lr"] == 2e-05


def test_other_content_of_a_file_is_noticed(make, data_dir, tmp_path):
    resume.open_run(make(), DEFAULT_TEMPLATE, is_main=True)
    (tmp_path / "data").mkdir()
    records = json.loads((data_dir / "cnn_train.json").read_text())
    (tmp_path / "data" / "cnn_train.json").write_text(json.dumps(records))
    args = make(data=tmp_path / "data", resume=True)
    folder = add_checkpoint(args, 4)
    assert resume.open_run(args, DEFAULT_TEMPLATE, is_main=True) == folder  # the same content at another place
    (tmp_path / "data" / "cnn_train.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match="the content of --data_path has changed"):
        resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)


def test_resuming_from_a_named_checkpoint(make, tmp_path):
    first = add_checkpoint(make(), 2)
    add_checkpoint(make(), 4)
    assert resume.open_run(make(resume_from_checkpoint=str(first)), DEFAULT_TEMPLATE, is_main=True) == first
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        resume.open_run(make(resume_from_checkpoint=str(tmp_path)), DEFAULT_TEMPLATE, is_main=True)


def test_another_prompt_is_refused(make):
    resume.open_run(make(), DEFAULT_TEMPLATE, is_main=True)
    args = make(resume=True)
    add_checkpoint(args, 4)
    with pytest.raises(UserError, match="the prompt template has changed"):
        resume.open_run(args, PromptTemplate("{instruction}", ""), is_main=True)


def resumed_on(make, processes: int, per_device: int, accumulated: int, **more):
    args = make(resume=True, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulated, **more)
    args.training.processes = processes
    return args


@pytest.fixture
def of_eight(make):
    """The record of a run of 8 processes with 2 samples each, and a checkpoint of it."""
    args = make(per_device_train_batch_size=2)
    args.training.processes, args.training.order_batch = 8, 16
    resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)
    return add_checkpoint(args, 4, training_state.VALUES)


@pytest.mark.parametrize("split", [(8, 2, 1), (4, 2, 2), (4, 4, 1), (1, 1, 16), (16, 1, 1)])
def test_other_processes_see_the_same_steps_in_the_same_order(make, of_eight, split):
    args = resumed_on(make, *split)
    args.training.order_batch = resume.order_batch(args, samples=100)
    assert args.training.order_batch == 16
    args.training.schedule(100, evaluates=False)
    assert args.training.max_steps == 3 * 6 and args.training.samples_per_epoch(100) == 96
    args.training.max_steps = -1  # the record was made without a schedule
    assert resume.open_run(args, DEFAULT_TEMPLATE, is_main=True) == of_eight


@pytest.mark.parametrize(
    ("split", "samples", "message"),
    [
        ((4, 2, 1), 100, r"optimizer steps of 16 samples \(--train_bs 2 on 8 process.*found 8; change --train_bs or"),
        ((2, 5, 1), 100, "found 10"),
        ((1, 16, 1), 100, None),
    ],
)
def test_other_steps_are_refused(make, of_eight, split, samples, message):
    args = resumed_on(make, *split)
    if message is None:
        assert resume.order_batch(args, samples) == 16
    else:
        with pytest.raises(UserError, match=message):
            resume.order_batch(args, samples)


def test_batches_that_do_not_divide_an_epoch_are_refused(make):
    args = make(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)
    add_checkpoint(args, 4, training_state.VALUES)
    other = resumed_on(make, 2, 4, 1)
    assert resume.order_batch(other, samples=96) == 4
    with pytest.raises(UserError, match="does not divide the 100 samples of an epoch"):
        resume.order_batch(other, samples=100)


def test_checkpoints_of_earlier_releases_need_the_same_processes(make):
    args = make()
    resume.open_run(args, DEFAULT_TEMPLATE, is_main=True)
    add_checkpoint(args, 4)
    assert resume.order_batch(resumed_on(make, 1, 4, 1), samples=100) == 4
    with pytest.raises(UserError, match="of an earlier release and resumes only on 1 process"):
        resume.order_batch(resumed_on(make, 2, 2, 1), samples=100)
