"""launch_finetune.sh: how options reach finetune.py and what it refuses. Training itself is tested in test_finetune."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def launch(*arguments, python: str = sys.executable, cwd=ROOT):
    return subprocess.run(
        ["bash", str(ROOT / "launch_finetune.sh"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def recorder(tmp_path):
    """A stand-in for python that prints the command it was given, one word a line, and sees two GPUs."""
    path = tmp_path / "py thon"
    path.write_text('#!/usr/bin/env bash\nif [ "$1" = -c ]; then echo 2; exit; fi\nprintf "%s\\n" "$@" "--END--"\n')
    path.chmod(0o755)
    return str(path)


def commands(result) -> list[list[str]]:
    assert result.returncode == 0, result.stderr
    runs = result.stdout.split("--END--\n")[:-1]
    return [run.splitlines() for run in runs]


def test_one_process_runs_plainly(recorder):
    result = launch("--num_processes", 1, "--model", "a b", "--output_dir=c d", "--lr", "1e-4", python=recorder)
    assert commands(result) == [[f"{ROOT}/finetune.py", "--model", "a b", "--output_dir=c d", "--lr", "1e-4"]]


def test_all_gpus_are_used_after_one_check(recorder):
    check, run = commands(launch("--model", "m", "--output_dir", "out put", python=recorder))
    assert check[-1] == "--check_only" and "launch" not in check
    assert run[:2] == ["-m", "accelerate.commands.launch"] and "--multi_gpu" in run
    assert run[run.index("--num_processes") + 1] == "2"
    assert run[-5:] == [f"{ROOT}/finetune.py", "--model", "m", "--output_dir", "out put"]


@pytest.mark.parametrize("joined", [False, True])
def test_machines_are_passed_to_accelerate(recorder, joined):
    options = {"num_processes": "16", "num_machines": "2", "machine_rank": "1", "main_process_ip": "10.0.0.1"}
    options["main_process_port"] = "1234"
    words = (
        [f"--{k}={v}" for k, v in options.items()] if joined else [w for k, v in options.items() for w in (f"--{k}", v)]
    )
    run = commands(launch(*words, "--model", "m", python=recorder))[1]
    for name, value in options.items():
        assert run[run.index(f"--{name}") + 1] == value
    assert run[-2:] == ["--model", "m"]


def test_gpus_count_per_machine(recorder):
    run = commands(launch("--num_machines", 3, "--main_process_ip", "h", "--model", "m", python=recorder))[1]
    assert run[run.index("--num_processes") + 1] == "6"
    assert run[run.index("--main_process_port") + 1] == "29500"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_processes"], "--num_processes needs a value"),
        (["--num_processes", "two"], "must be an integer, got 'two'"),
        (["--num_processes=0"], "must be at least 1"),
        (["--num_machines", "2", "--num_processes", "2"], "needs --main_process_ip"),
    ],
)
def test_wrong_launcher_options(recorder, words, message):
    result = launch(*words, python=recorder)
    assert result.returncode == 2 and message in result.stderr


def test_unknown_options_are_refused_with_the_usage_and_a_hint():
    for processes in (1, 2):
        words = ["--num_processes", processes, "--model", "m", "--restore_path", "p", "--output_dir", "o"]
        result = launch(*words, "--learning_speed", 3)
        assert result.returncode == 2
        assert result.stderr.count("unrecognized arguments: --learning_speed 3") == 1
        assert result.stderr.count("error: ") == 1 and "did you mean --learning_rate" in result.stderr
        assert "usage: bash launch_finetune.sh" in result.stderr and "Traceback" not in result.stderr


def test_missing_file_is_reported_once_before_any_process_starts(tmp_path):
    result = launch(
        "--num_processes", 2, "--model", tmp_path, "--restore_path", tmp_path / "no.pth", "--output_dir", tmp_path
    )
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1 and "PTS state (--restore_path) not found" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["--model", "m", "--output_dir", "o"]])
def test_without_the_requirements_one_line_says_what_to_install(tmp_path, words):
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    result = launch(*words, python=str(bare))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: the package ") and "pip install -r requirements.txt" in result.stderr


def test_help_shows_both_sets_of_options():
    result = launch("--help")
    assert result.returncode == 0
    for word in ("--num_machines", "--main_process_ip", "--gradient_accumulation_steps", "--distill", "--resume"):
        assert word in result.stdout
