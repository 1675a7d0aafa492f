"""What code takes of its process: time, CPU time, memory. Imports nothing but Python's own modules."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROCESS_STATUS = Path("/proc/self/status")
INTERVAL = 0.02  # seconds between two looks at another process


def memory_kib(field: str, status: Path = PROCESS_STATUS) -> int:
    """VmRSS (now), RssAnon (of that, what no file backs) or VmHWM (peak) of a process in KiB, from Linux; 0 if dead."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def peak_of_command(*command: Any) -> float:
    """Run a command to its end; the peak in MiB of its process's memory that no file backs.

    Raises:
        CalledProcessError: it failed.
    """
    words = [str(word) for word in command]
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHON": sys.executable}) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, memory_kib("RssAnon", status))
            time.sleep(INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return peak / 1024


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill the dictionary, once the block has ended, with `seconds`, `cpu_seconds` and `memory_mib`.

    Memory is the peak within the block, less what the process held before.
    """
    figures: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, busy = memory_kib("VmRSS"), time.perf_counter(), time.process_time()
    yield figures
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["memory_mib"] = round((memory_kib("VmHWM") - before) / 1024, 1)
    figures["cpu_seconds"] = round(time.process_time() - busy, 1)
