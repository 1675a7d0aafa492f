"""Running scripts of the project in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsity.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # the folder of the scripts


def run_command(*command: Any) -> str:
    """Run a command with this interpreter as the launcher's; its messages and progress go to the terminal.

    If the command fails, this process ends with the same exit code: the command has printed the reason.

    Returns:
        its standard output.

    Raises:
        UserError: it was killed, for example because memory ran out.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if result.returncode < 0:
        raise UserError(f"killed by signal {-result.returncode}, perhaps for lack of memory: {shlex.join(words)}")
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def run_for_figures(*command: Any) -> dict[str, Any]:
    """As `run_command`; returns the JSON of the command's last line."""
    return json.loads(run_command(*command).strip().splitlines()[-1])
