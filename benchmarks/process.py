"""Time, CPU time and memory of a block of code. Imports the standard library alone, so that it adds no memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESS_STATUS = Path("/proc/self/status")
INTERVAL = 0.01  # seconds between two samples of the memory


def memory_kib(field: str) -> int:
    """VmRSS (now), RssAnon (the part of it that no file backs) or VmHWM (peak) of this process, in KiB."""
    return next(int(line.split()[1]) for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(field))


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill the dictionary, once the block has ended, with `seconds`, `cpu_seconds` and `memory_mib`.

    Memory is the peak within the block minus the memory before it.
    """
    figures: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, busy = memory_kib("VmRSS"), time.perf_counter(), time.process_time()
    yield figures
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["memory_mib"] = round((memory_kib("VmHWM") - before) / 1024, 1)
    figures["cpu_seconds"] = round(time.process_time() - busy, 1)


@contextmanager
def anonymous_memory() -> Iterator[dict[str, float]]:
    """As `measured`, for `memory_mib` without memory-mapped files, whose pages the system can drop and read again."""
    figures: dict[str, float] = {}
    before = peak = memory_kib("RssAnon")
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(INTERVAL):
            peak = max(peak, memory_kib("RssAnon"))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    yield figures
    ended.set()
    watcher.join()
    figures["memory_mib"] = round((peak - before) / 1024, 1)
