"""What every script shares through utils.py: how it ends, and how it parses options."""

from __future__ import annotations

import pytest
from conftest import ROOT, run_script

import utils
from sparsity.errors import UserError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no such thing"), 1, "error: no such thing"),
        (OSError(28, "No space left on device", "x.bin"), 1, "No space left on device (x.bin)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_cli_turns_foreseen_failures_into_one_line(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        utils.run_cli(main)
    assert caught.value.code == code
    assert words in capsys.readouterr().err


def test_run_cli_does_not_hide_defects():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        utils.run_cli(main)


FAILS = """
import sys
from sparsity.distributed import start_processes
from sparsity.errors import UserError
from utils import run_cli

def main():
    process = start_processes("cpu")
    if str(process.process_index) in sys.argv[1]:
        raise UserError(f"wrong input in process {process.process_index}")
    process.wait_for_everyone()

run_cli(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_one_of_two_processes_reports_a_failure_and_both_end(tmp_path, failing):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = run_script(*launch, script, failing, env={"PYTHONPATH": str(ROOT)}, timeout=100)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]  # the rest is torchrun's
    assert result.returncode == 1 and len(lines) == 1 and "wrong input in process" in lines[0], result.stderr
