"""quickstart.sh and run_tests.sh without their heavy parts: order of steps, reuse, failure, arguments."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

# Stands in for the environment: `python` notes its call and makes the files that the real scripts would make.
SETUP = """
setup_env() { mkdir -p .venv/bin; cp fake_python .venv/bin/python; }
"""
PYTHON = (
    f"""#!/usr/bin/env bash
[[ $1 == tools/run_step.py || $2 == tools.side_by_side ]] && exec {sys.executable} "$@"
[[ $2 == tools.pace ]] && {{ echo 2.0; exit; }}
"""
    + """
echo "$*" >> calls
script=$1
echo "a line for the log of $script"
echo "warning: of $script"
[[ $1 == -m ]] && script=$2
[[ $script == "$(cat fail 2>/dev/null)" ]] && { echo "the reason"; exit 1; }
while (($#)); do
  case $1 in
    --output_json) mkdir -p "$(dirname "$2")"; echo {} > "$2" ;;
    --save_path) mkdir -p "$2"; touch "$2"/{calib,heldout}.jsonl "$2/manual.txt"; echo x > "$2/cnn_train.json" ;;
    --output_dir) mkdir -p "$2"
      case $script in
        tools.prepare_demo) echo x > "$2/model.safetensors" ;;
        hf_pts.py) echo x > "$2/pts_modelopt_state.pth" ;;
        finetune.py) echo x > "$2/finetuned_modelopt_state.pth" ;;
        report.py) echo "| table |" ;;
      esac ;;
  esac
  shift
done
"""
)


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("run_step.py", "side_by_side.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "tools" / "setup_env.sh").write_text(SETUP)
    (tmp_path / "fake_python").write_text(PYTHON)
    (tmp_path / "fake_python").chmod(0o755)
    (tmp_path / "launch_finetune.sh").write_text('python finetune.py "$@"')
    return tmp_path


def quickstart(project, *arguments):
    (project / "calls").unlink(missing_ok=True)
    result = subprocess.run(
        ["bash", project / "quickstart.sh", *arguments], capture_output=True, text=True, cwd="/", timeout=60
    )
    calls = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    return result, calls


SCRIPTS = ["tools.prepare_demo", "data_prep.py", "hf_pts.py", "finetune.py"]
SCRIPTS += [*["eval.py"] * 3, "report.py"]


def scripts(calls):
    return [call.removeprefix("-m ").split()[0] for call in calls]


def test_steps_run_in_order_and_the_second_run_only_reports(project):
    result, calls = quickstart(project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert scripts(calls) == SCRIPTS
    # Dense without a state, the pruned and the fine-tuned one, side by side.
    states = [call.partition("--modelopt_restore_path ")[2].partition(" ")[0] for call in calls[4:7]]
    assert {state.rpartition("/")[2] for state in states} == (
        {"", "pts_modelopt_state.pth", "finetuned_modelopt_state.pth"}
    )
    assert "| table |" in result.stdout and "report.html" in result.stdout
    result, calls = quickstart(project)
    assert result.returncode == 0
    assert scripts(calls) == ["report.py"]


def test_calibration_is_from_training_and_perplexity_from_held_out_text(project):
    _, calls = quickstart(project)
    by_script = {call.split()[0]: call for call in calls}
    assert "/calib.jsonl" in by_script["hf_pts.py"]
    assert "papers=data/aclsum/heldout.jsonl manual=data/aclsum/manual.txt" in by_script["eval.py"]
    assert "/cnn_eval.json" in by_script["eval.py"]


def test_screen_shows_estimates_and_warnings_and_the_log_everything(project):
    result, _ = quickstart(project)
    lines = result.stdout.splitlines()
    plan = re.search(r'^plan="(.*)"$', (ROOT / "quickstart.sh").read_text(), re.MULTILINE)[1].split()
    names, seconds = plan[::2], [2 * int(word) for word in plan[1::2]]  # at the pace of the stand-in
    for number, name in enumerate(names):
        of_step = [line for line in lines if line.startswith(f"[{number + 1}/{len(names)}] {name}: ")]
        assert len(of_step) == 2 and re.search(r"took \d+ s$", of_step[1])
        left = round(sum(seconds[number:]) / 60)
        assert left <= 1 or of_step[0].endswith(f"on this machine, about {left} min left in all")
    assert "warning: of hf_pts.py" in lines
    assert not [line for line in lines if line.startswith("a line for the log") and "report.py" not in line]
    log = next(project.glob("saved_models*/steps/PTS.log")).read_text()
    assert "a line for the log of hf_pts.py" in log
    assert len(lines) < 40


def test_on_a_terminal_the_changing_line_holds_the_time_left_and_the_bar(tmp_path):
    """In a terminal of its own: the bar of the step is seen and stays out of the lines that remain."""
    step = "import sys, time; sys.stderr.write('\\r 50%|###   | 5/10'); sys.stderr.flush(); time.sleep(1.5); "
    step += "sys.stderr.write('\\r100%|######|\\n'); print('done'); print('error: bad news')"
    command = [sys.executable, ROOT / "tools" / "run_step.py", "--log", tmp_path / "log", "--plan", "a 60 b 120"]
    command += ["--name", "a", "--", sys.executable, "-c", step]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen([str(word) for word in command], stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(ours, 4096):
            seen += data
    os.close(ours)
    assert process.wait() == 0
    text = seen.decode()
    assert "[1/2] a (about 60 s): 0:00 so far, about 3 min left | 50%|###   | 5/10" in text
    remaining = [line.rpartition("\033[K")[2].rstrip() for line in text.split("\n") if line.strip()]
    assert remaining[0] == "error: bad news" and remaining[1].startswith("[1/2] a: took ") and len(remaining) == 2
    assert (tmp_path / "log").read_text().count("done") == 1


def test_failed_step_names_itself_and_the_next_run_resumes_there(project):
    (project / "fail").write_text("finetune.py")
    result, calls = quickstart(project)
    assert result.returncode == 1
    assert scripts(calls) == SCRIPTS[:4]
    last = result.stderr.strip().splitlines()[-1]
    assert "step SAT failed" in last and last.endswith("bash quickstart.sh")
    log = project / last.partition("output is in ")[2].partition(". To resume")[0]
    assert "the reason" in log.read_text() and "    the reason" in result.stderr
    (project / "fail").unlink()
    result, calls = quickstart(project)
    assert result.returncode == 0
    assert scripts(calls) == SCRIPTS[3:]


def test_a_failed_evaluation_is_repeated_and_no_other(project):
    quickstart(project)
    next(project.glob("saved_models*/eval/PTS/rouge.json")).unlink()
    (project / "fail").write_text("eval.py")
    result, calls = quickstart(project)
    assert result.returncode == 1 and "step evaluate failed" in result.stderr and "    the reason" in result.stderr
    (project / "fail").unlink()
    result, calls = quickstart(project)
    assert result.returncode == 0 and scripts(calls) == ["eval.py", "report.py"]
    assert "pts_modelopt_state.pth" in calls[0]
    assert "evaluate-SAT: already done" in result.stdout


def side_by_side(folder, *commands, **more):
    words = [word for command in commands for word in (":::", *command)][1:]
    command = [sys.executable, "-m", "tools.side_by_side", "--logs", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **more)


def test_commands_run_at_the_same_time_and_share_the_threads(tmp_path):
    """Each waits for a file of the other's."""
    meet = f"import os, pathlib, time; os.chdir({str(tmp_path)!r}); pathlib.Path('{{0}}').touch()\n"
    meet += "while not os.path.exists('{1}'): time.sleep(0.01)\n"
    meet += "print('warning: {0} with', os.environ['OMP_NUM_THREADS']); print('only in the log')"
    commands = [(name, sys.executable, "-c", meet.format(name, other)) for name, other in ("ab", "ba")]
    result = side_by_side(tmp_path, *commands, env={**os.environ, "OMP_NUM_THREADS": "8"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(result.stdout.splitlines()) == ["warning: a with 4", "warning: b with 4"]
    assert "only in the log" in (tmp_path / "a.log").read_text()


def test_the_first_failure_stops_the_others_and_is_shown(tmp_path):
    failing = "import sys, time; time.sleep(0.5); print('error: the reason'); sys.exit(3)"
    waiting = "import time; time.sleep(100)"
    result = side_by_side(tmp_path, ("a", sys.executable, "-c", waiting), ("b", sys.executable, "-c", failing))
    assert result.returncode == 3 and result.stdout == "error: the reason\n"


@pytest.mark.parametrize("shift", [5, -5], ids=["later", "earlier, by a clock set back"])
def test_a_changed_input_is_noticed(project, shift):
    quickstart(project)
    state = next(project.glob("saved_models*/pts_modelopt_state.pth"))
    os.utime(state, (state.stat().st_mtime + shift,) * 2)
    _, calls = quickstart(project)
    assert "hf_pts.py" not in scripts(calls)
    assert scripts(calls)[0] == "finetune.py"


def test_inputs_from_the_future_repeat_no_step_and_cost_no_checkpoint(project):
    """As after a clock was set back, or from a machine whose clock is ahead."""
    (project / "fail").write_text("finetune.py")
    quickstart(project)
    for path in [*project.rglob("*.jsonl"), *project.glob("*.sh"), *project.rglob("*.pth")]:
        os.utime(path, (path.stat().st_mtime + 3600,) * 2)
    quickstart(project)
    checkpoint = next(project.glob("saved_models*")) / "finetuned" / "checkpoints" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    _, calls = quickstart(project)
    assert scripts(calls) == ["finetune.py"] and checkpoint.is_dir()
    (project / "fail").unlink()
    quickstart(project)
    _, calls = quickstart(project)
    assert scripts(calls) == ["report.py"]


def test_full_has_a_folder_of_its_own(project):
    quickstart(project)
    _, calls = quickstart(project, "--full")
    assert scripts(calls) == SCRIPTS[2:]
    assert len(list(project.glob("saved_models*"))) == 2


@pytest.mark.parametrize("script", ["quickstart.sh", "run_tests.sh"])
def test_help_explains(script):
    result = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert f"bash {script}" in result.stdout and "set -" not in result.stdout


def test_unknown_argument_is_refused(project):
    result, calls = quickstart(project, "--fast")
    assert result.returncode == 2
    assert "unknown argument '--fast'" in result.stderr and not calls


SHELL_SCRIPTS = ["quickstart.sh", "run_tests.sh", "launch_finetune.sh", "tools/setup_env.sh"]
SHELL_SCRIPTS += ["benchmarks/gpu/check.sh", ".ci/run"]


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_syntax(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True, timeout=60)


def test_environment_is_not_installed_twice(tmp_path):
    """With a stand-in for pip: installed once, then only what changed; a failure is reported and tried again."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/bash\n[[ $2 != pip ]] && exit 0\necho "$* $PYTHONDONTWRITEBYTECODE" >> pips\n! grep -q broken a.txt\n'
    )
    python.chmod(0o755)
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "demo.txt").write_text("b\n")
    command = f"set -o pipefail; source {ROOT}/tools/setup_env.sh; "
    command += "TORCH_SPEC=torch==9 setup_env .venv '' a.txt requirements/demo.txt"

    def run():
        (tmp_path / "pips").write_text("")
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # what pip does not compile would never be kept
        words = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run(["bash", "-c", command], **words)
        calls = (tmp_path / "pips").read_text().splitlines()
        return result, [call.partition("check --no-compile ")[2].removesuffix(" ") for call in calls]

    result, installed = run()
    assert result.returncode == 0 and result.stderr == ""
    assert installed == ["torch==9", "--requirement a.txt", "--no-deps --requirement requirements/demo.txt"]
    assert run()[1] == []
    (tmp_path / "a.txt").write_text("a\nc\n")
    assert run()[1] == ["--requirement a.txt"]
    (tmp_path / "a.txt").write_text("broken\n")
    result, _ = run()
    assert result.returncode == 1 and "could not install a.txt" in result.stderr
    assert run()[1] == ["--requirement a.txt"]
