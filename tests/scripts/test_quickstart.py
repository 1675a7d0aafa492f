"""quickstart.sh and run_tests.sh without their heavy parts: steps, reuse, failure, arguments, environment."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

# Stands in for Python in the environment: notes its call and creates the files that the real scripts would.
PYTHON = r"""#!/usr/bin/env bash
script=${1/-m/$2}
echo "$*" >>calls
echo "in the log of $script"
echo "warning: of $script"
[[ $script == "$(cat fail 2>/dev/null)" ]] && { echo "the reason"; exit 1; }
while (($#)); do
  case $1 in
    --output_json) mkdir -p "${2%/*}"; echo {} >"$2" ;;
    --save_path) mkdir -p "$2"; echo x >"$2/further.jsonl" ;;
    --output_dir) mkdir -p "$2"
      case $script in
        tools.prepare_demo) echo x >"$2/model.safetensors" ;;
        hf_pts.py) echo x >"$2/pts_modelopt_state.pth" ;;
        finetune.py) echo x >"$2/finetuned_modelopt_state.pth" ;;
        report.py) echo "| table |" ;;
      esac ;;
  esac
  shift
done
"""


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    (tmp_path / "tools").mkdir()
    setup = "setup_env() { mkdir -p .venv/bin; cp fake_python .venv/bin/python; }"
    (tmp_path / "tools" / "setup_env.sh").write_text(setup)
    (tmp_path / "fake_python").write_text(PYTHON)
    (tmp_path / "fake_python").chmod(0o755)
    (tmp_path / "launch_finetune.sh").write_text('python finetune.py "$@"')
    return tmp_path


def quickstart(project, *arguments):
    """Run it; returns the result and the scripts that were called, sorted where they run side by side."""
    (project / "calls").unlink(missing_ok=True)
    command = ["bash", project / "quickstart.sh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
    calls = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    scripts = [call.removeprefix("-m ").split()[0] for call in calls]
    return result, scripts[:4] + sorted(scripts[4:])


STEPS = ["tools.prepare_demo", "data_prep.py", "hf_pts.py", "finetune.py"]
EVALUATIONS = ["eval.py"] * 3 + ["eval_ppl.py"] * 3


def test_steps_run_in_order_and_the_second_run_only_reports(project):
    result, scripts = quickstart(project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert scripts == [*STEPS, *EVALUATIONS, "report.py"]
    assert "| table |" in result.stdout and "warning: of hf_pts.py" in result.stdout
    assert "in the log of hf_pts.py" not in result.stdout
    calls = (project / "calls").read_text()
    for script in ("eval.py", "eval_ppl.py"):  # each of the dense model, the pruned and the fine-tuned one
        of_script = [call for call in calls.splitlines() if call.startswith(f"{script} ")]
        assert [sum(name in call for call in of_script) for name in ("/pts_model", "/finetuned_model")] == [1, 1]
    result, scripts = quickstart(project)
    assert result.returncode == 0 and scripts == ["report.py"]


@pytest.mark.parametrize("script", ["finetune.py", "eval_ppl.py"])
def test_a_failed_step_names_its_log_and_the_next_run_resumes_there(project, script):
    (project / "fail").write_text(script)
    result, scripts = quickstart(project)
    assert result.returncode == 1 and scripts[-1] != "report.py"
    assert "the reason" in result.stderr
    log = result.stderr.strip().splitlines()[-1].partition("failed; see ")[2].partition(". ")[0]
    assert f"in the log of {script}" in (project / log).read_text()
    (project / "fail").unlink()
    result, scripts = quickstart(project)
    assert result.returncode == 0 and not set(scripts) & set(STEPS[:3]) and "report.py" in scripts


def test_results_of_other_settings_are_not_reused(project):
    quickstart(project)
    with (project / "quickstart.sh").open("a") as script:
        script.write("# changed\n")
    result, scripts = quickstart(project)
    assert result.returncode == 1 and scripts == []
    assert "to start over: rm -r saved_models" in result.stderr
    result, scripts = quickstart(project, "--full")  # which has a folder of its own
    assert result.returncode == 0 and scripts[:2] == STEPS[2:]


def test_unknown_argument_is_refused(project):
    result, scripts = quickstart(project, "--fast")
    assert result.returncode == 2 and not scripts
    assert "unknown argument '--fast'" in result.stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "run_tests.sh"])
def test_help_explains(script):
    result = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert f"bash {script}" in result.stdout and "set -" not in result.stdout


def test_environment_is_not_installed_twice(tmp_path):
    """With a stand-in for pip: installed once, then only what changed; a failure is reported and tried again."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\n[[ $2 != pip ]] && exit 0\necho "$*" >> pips\n! grep -q broken a.txt\n')
    python.chmod(0o755)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "demo.txt").write_text("b\n")
    command = f"source {ROOT}/tools/setup_env.sh; TORCH_SPEC=torch==9 setup_env .venv '' a.txt requirements/demo.txt"

    def install(text):
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "pips").write_text("")
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=60
        )
        return result, [call.partition("--no-compile ")[2] for call in (tmp_path / "pips").read_text().splitlines()]

    result, installed = install("a\n")
    assert result.returncode == 0 and result.stderr == ""
    assert installed == ["torch==9", "--requirement a.txt", "--no-deps --requirement requirements/demo.txt"]
    assert install("a\n")[1] == []
    assert install("a\nc\n")[1] == ["--requirement a.txt"]
    result, _ = install("broken\n")
    assert result.returncode == 1 and "could not install a.txt" in result.stderr
    assert install("broken\n")[1] == ["--requirement a.txt"]
