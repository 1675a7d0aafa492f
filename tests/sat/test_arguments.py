"""Options of fine-tuning once parsed: values that cannot work, and what depends on the number of samples."""

from __future__ import annotations

import pytest

from sparsity.errors import UserError
from sparsity.sat.arguments import (
    RESUME,
    DataArguments,
    DistillationArguments,
    ModelArguments,
    SatArguments,
    SparseTrainingArguments,
    check_arguments,
    choose_precision,
    options,
)


def training(**options) -> SparseTrainingArguments:
    return SparseTrainingArguments(output_dir="out", **options)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("data", {"model_max_length": 0}, "--max_length must be at least 2, got 0"),
        ("data", {"text_ratio": 1.5}, "--text_ratio must be between 0 and 1, got 1.5"),
        ("data", {"text_path": ["/nowhere.txt"]}, "text file not found: /nowhere.txt"),
        ("distillation", {"distill_kl": -0.5}, "--distill_kl must be between 0 and 1, got -0.5"),
        ("training", {"learning_rate": float("nan")}, "--lr must be greater than 0, got nan"),
        ("training", {"per_device_train_batch_size": 0}, "--train_bs must be greater than 0, got 0"),
        ("training", {"max_steps": 0}, "--max_steps must be greater than 0, got 0"),
        ("training", {"num_train_epochs": -1}, "--num_epochs must be greater than 0"),
        ("training", {"save_steps": 0}, "--save_steps must be greater than 0"),
        ("training", {"save_total_limit": 0}, "--save_total_limit must be greater than 0"),
        ("training", {"max_grad_norm": -1.0}, "--max_grad_norm must not be negative"),
        ("training", {"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw is not supported"),
        ("training", {"cpu_offload": True}, "--cpu_offload needs FSDP"),
    ],
)
def test_values_that_cannot_work_are_refused_under_their_short_names(part, options, message):
    kinds = {"data": DataArguments, "distillation": DistillationArguments, "training": training}
    parts = {name: kind(**options) if name == part else kind() for name, kind in kinds.items()}
    with pytest.raises(UserError, match=message):
        check_arguments(SatArguments(model=ModelArguments("m", "p"), **parts))


@pytest.mark.parametrize(
    "options",
    [
        {"deepspeed": "x.json"},
        {"label_smoothing_factor": 0.1},
        {"auto_find_batch_size": True},
        {"use_liger_kernel": True},
        {"save_only_model": True},
        {"remove_unused_columns": True},
    ],
    ids=str,
)
def test_what_masks_and_checkpoints_do_not_allow_is_refused(options):
    with pytest.raises(UserError, match=f"--{next(iter(options))} "):
        training(**options)


def test_folders_of_result_and_checkpoints(tmp_path):
    args = SparseTrainingArguments(output_dir=str(tmp_path / "out"))
    assert args.result_dir == tmp_path / "out" and args.output_dir == str(tmp_path / "out" / "checkpoints")


def test_precision_on_a_cpu():
    assert choose_precision("no") == "no" and choose_precision("bf16") == "bf16"
    assert choose_precision("auto") in ("no", "bf16")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        choose_precision("fp16")


@pytest.mark.parametrize(
    ("options", "steps", "per_epoch"),
    [
        ({"per_device_train_batch_size": 4}, 75, 25),
        ({"per_device_train_batch_size": 3, "num_train_epochs": 1}, 33, 33),
        ({"per_device_train_batch_size": 3, "num_train_epochs": 1, "dataloader_drop_last": False}, 34, 34),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 0.5}, 5, 9),
        ({"per_device_train_batch_size": 4, "max_steps": 7}, 7, 25),
    ],
)
def test_steps_of_a_hundred_samples(options, steps, per_epoch):
    args = training(**options)
    args.schedule(100, evaluates=False)
    assert (args.max_steps, args.save_steps) == (steps, per_epoch)


def test_schedule_completes_what_was_left_open():
    args = training(per_device_train_batch_size=4)
    args.schedule(100, evaluates=True)
    assert (args.max_steps, args.eval_steps, args.save_steps) == (75, 25, 25)
    assert args.warmup_steps == round(0.03 * 75)
    args = training(eval_steps=5, save_steps=6, warmup_steps=9, load_best_model_at_end=True, max_steps=12)
    args.schedule(100, evaluates=True)
    assert (args.max_steps, args.eval_steps, args.save_steps, args.warmup_steps) == (12, 5, 6, 9)
    assert args.load_best and args.metric_for_best_model == "loss" and args.greater_is_better is False
    args.schedule(100, evaluates=False)
    assert str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no"


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match=r"3 training samples do not fill one batch of 4 on 1 process"):
        training().schedule(3, evaluates=False)


def test_records_of_reference_and_launcher(tmp_path):
    data = DataArguments(data_path=str(tmp_path))
    assert (data.train_file, data.eval_file) == (tmp_path / "cnn_train.json", tmp_path / "cnn_eval.json")
    data = DataArguments(data_path=str(tmp_path), train_datapath="a.json", val_datapath="b.json")
    assert (str(data.train_file), str(data.eval_file)) == ("a.json", "b.json")
    assert not DataArguments(text_path=["t"], text_ratio=1).uses_records and DataArguments(text_ratio=1).uses_records


def test_an_option_is_declared_once_with_what_a_resumed_run_must_keep():
    args = SatArguments(ModelArguments("m", "p"), DataArguments(), DistillationArguments(), training(learning_rate=1))
    values = {name: value for name, value, _ in options(args)}
    kept = {name for name, _, notes in options(args) if RESUME in notes}
    assert values["lr"] == 1 and values["max_length"] == 1024 and values["optim"] == "adamw_torch_fused"
    assert {"lr", "seed", "distill_kl", "max_grad_norm", "model"} <= kept
    assert not {"resume", "workers", "save_steps", "logging_steps", "output_dir"} & kept
