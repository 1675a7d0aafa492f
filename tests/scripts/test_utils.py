"""What every script shares through utils.py: how it ends, and how it parses options."""

from __future__ import annotations

import pytest

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
