"""finetune.py's command line: names of the reference, of the launcher and of Hugging Face; what is refused, and how."""

from __future__ import annotations

import sys

import pytest
from conftest import assert_clear_error, run_inline

import finetune

# The name in the reference, the launcher's, a value, and what it becomes.
NAMES = [
    ("--model_name_or_path", "--model", "a b", lambda args: args.model.model_name_or_path, "a b"),
    ("--modelopt_restore_path", "--restore_path", "p.pth", lambda args: args.model.modelopt_restore_path, "p.pth"),
    ("--model_max_length", "--max_length", "77", lambda args: args.data.model_max_length, 77),
    ("--num_train_epochs", "--num_epochs", "2.5", lambda args: args.training.num_train_epochs, 2.5),
    ("--per_device_train_batch_size", "--train_bs", "3", lambda args: args.training.per_device_train_batch_size, 3),
    ("--per_device_eval_batch_size", "--eval_bs", "5", lambda args: args.training.per_device_eval_batch_size, 5),
    ("--learning_rate", "--lr", "1e-4", lambda args: args.training.learning_rate, 1e-4),
    ("--train_datapath", "--train_datapath", "t.json", lambda args: str(args.data.train_file), "t.json"),
    ("--val_datapath", "--val_datapath", "v.json", lambda args: str(args.data.eval_file), "v.json"),
    ("--output_dir", "--output_dir", "o u t", lambda args: str(args.training.result_dir), "o u t"),
]
REQUIRED = {"--model_name_or_path": "m", "--modelopt_restore_path": "p", "--output_dir": "o"}


@pytest.fixture
def parse(monkeypatch):
    """Parse command-line words as finetune.py does."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
        return finetune.parse_args()

    return call


@pytest.mark.parametrize("joined", [False, True], ids=["--flag value", "--flag=value"])
@pytest.mark.parametrize("short", [False, True], ids=["reference", "launcher"])
@pytest.mark.parametrize(("name", "alias", "value", "read", "expected"), NAMES, ids=[row[0] for row in NAMES])
def test_both_names_and_both_forms(parse, name, alias, value, read, expected, short, joined):
    flags = {key: word for key, word in REQUIRED.items() if key != name} | {alias if short else name: value}
    pairs = [[f"{key}={word}"] if joined else [key, word] for key, word in flags.items()]
    words = [word for pair in pairs for word in pair]
    assert read(parse(*words)) == expected


def test_options_of_the_trainer_reach_it(parse):
    required = [word for pair in REQUIRED.items() for word in pair]
    words = [
        "--report_to",
        "none",
        "--run_name",
        "x",
        "--logging_steps",
        "5",
        "--optim",
        "adamw_torch",
        "--max_grad_norm",
        "0.5",
    ]
    training = parse(*required, *words).training
    assert training.report_to in ([], ["none"], "none") and training.run_name == "x"
    assert (training.logging_steps, training.max_grad_norm) == (5, 0.5)
    assert getattr(training.optim, "value", training.optim) == "adamw_torch"
    plain = parse(*required).training
    assert (plain.logging_steps, plain.max_grad_norm, plain.learning_rate) == (10, 1.0, 2e-5)


def test_text_sources_are_several_words(parse):
    required = [word for pair in REQUIRED.items() for word in pair]
    assert parse(*required, "--text_path", "a.txt=0.4", "self=0.6").data.text_path == ["a.txt=0.4", "self=0.6"]


def test_switches_may_be_turned_off(parse):
    required = [word for pair in REQUIRED.items() for word in pair]
    assert parse(*required).training.group_by_length is True
    assert parse(*required, "--no_group_by_length").training.group_by_length is False
    assert parse(*required, "--no-group-by-length").training.group_by_length is False
    assert parse(*required, "--gradient_checkpointing").training.recompute is True
    assert parse(*required, "--gradient_checkpointing", "false").training.recompute is False
    assert parse(*required, "--packing", "--distill").data.packing is True


def run(*words):
    return run_inline("finetune.py", *(word for pair in REQUIRED.items() for word in pair), *words)


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["--learning_speed", "3"], ["unrecognized arguments: --learning_speed 3", "did you mean --learning_rate"]),
        (["--max_len", "3"], ["unrecognized arguments: --max_len 3"]),  # no abbreviations
        (["--trainbs=3"], ["--trainbs", "did you mean --train_bs"]),
        (["--train_bs", "two"], ["invalid int value: 'two'"]),
        (["--mixed_precision", "fp8"], ["invalid choice: 'fp8'"]),
        (["stray"], ["unrecognized arguments: stray"]),
        (["--lr"], ["expected one argument"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_the_parser_can_know_ends_with_code_2(words, needles):
    result = run(*words)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")
    assert_clear_error(result, *needles)
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("words", [["--optim", "adamw_torch_fast"], ["--lr_scheduler_type", "zigzag"]], ids=str)
def test_values_that_transformers_does_not_know_are_refused_in_one_line(words):
    assert_clear_error(run(*words), words[1])


def test_further_processes_keep_quiet(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = run_inline("finetune.py", "--learning_speed", "3")
    assert result.returncode == 2 and result.stderr == ""
