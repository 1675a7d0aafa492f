"""What a block of code takes of its process: time, CPU time, memory. Imports nothing but Python's own modules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESS_STATUS = Path("/proc/self/status")


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in KiB, from Linux."""
    return next(int(line.split()[1]) for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(field))


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
