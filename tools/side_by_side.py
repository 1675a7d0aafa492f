"""Run several commands at the same time, with the processor's cores shared out among them.

    python -m tools.side_by_side --logs FOLDER NAME COMMAND… ::: NAME COMMAND…

Several processes with few threads each keep the cores busier than one after the other with all threads: one computes
while another loads its libraries, and few threads seldom wait for one another. The output of each goes to
FOLDER/NAME.log, its lines that begin with "error:" or "warning:" also to the screen. If one fails, the others are
stopped, its last lines follow, and its exit code is passed on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tools.run_step import LAST_LINES, PASSED_ON, lines_of

SEPARATOR = ":::"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", required=True, type=Path, metavar="FOLDER", help="folder for the logs")
    parser.add_argument(
        "commands", nargs=argparse.REMAINDER, help=f"a name and its command, and so on behind {SEPARATOR}"
    )
    args = parser.parse_args()
    args.commands = split(args.commands)
    if any(len(words) < 2 for words in args.commands):
        parser.error(f"each part between {SEPARATOR} must be a name and a command")
    return args


def split(words: list[str]) -> list[list[str]]:
    """The words between separators."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def environment(count: int) -> dict[str, str]:
    """The environment of each of `count` processes, with its share of the threads that one would have."""
    if count == 1:
        return dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, round(threads / count)))}


def wait(running: dict[subprocess.Popen, Path]) -> int:
    """Wait for the processes (with their logs) to end.

    Returns:
        the exit code of the first that fails, after the others were stopped; else 0.
    """
    while running:
        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            lines = lines_of(running.pop(process))
            failed = process.returncode != 0
            shown = lines[-LAST_LINES:] if failed else [line for line in lines if line.startswith(PASSED_ON)]
            print("\n".join(shown), end="\n" if shown else "", flush=True)
            if failed:
                for other in running:
                    other.terminate()
                for other in running:
                    other.wait()
                return process.returncode if process.returncode > 0 else 128 - process.returncode
    return 0


def main() -> None:
    args = parse_args()
    running, shared = {}, environment(len(args.commands))
    for name, *command in args.commands:
        log = args.logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=shared)
        running[process] = log
    try:
        code = wait(running)
    except KeyboardInterrupt:  # the commands have got the signal as well
        for process in running:
            process.wait()
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
