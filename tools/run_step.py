"""Run one step of quickstart.sh: all its output goes to a log, and one line to the screen.

    python tools/run_step.py --log FILE --plan "PTS 100 SAT 200" --name PTS --pace 1.5 --elapsed SECONDS -- COMMAND…

A terminal shows, while the step runs, its number, the time so far, the time left in all, and the step's own progress
bar. Lines that begin with "error:" or "warning:" are shown as they come. If the command fails, the last lines of its
log follow, and its exit code is passed on.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import math
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import BinaryIO

LAST_LINES = 15  # of the log of a step that failed
PASSED_ON = ("error:", "warning:")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", required=True, metavar="FILE", help="file for everything the command writes")
    parser.add_argument("--plan", required=True, help="all steps in order: their names, each with its seconds")
    parser.add_argument("--name", required=True, help="name of this step in the plan")
    parser.add_argument("--pace", type=float, default=1.0, help="factor for the seconds of the plan on this machine")
    parser.add_argument("--elapsed", type=float, default=0.0, help="seconds since the first step began")
    parser.add_argument("command", nargs="+", help="after --")
    return parser.parse_args()


def rounded(seconds: float) -> str:
    """A time as one tells it: "20 s", "3 min"."""
    return f"{max(5, 5 * round(seconds / 5))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Screen:
    """What the user sees of a step: lines that stay, and on a terminal one line that changes."""

    def __init__(self, args: argparse.Namespace):
        words = args.plan.split()
        names, seconds = words[::2], [args.pace * float(word) for word in words[1::2]]
        place = names.index(args.name)
        self.title = f"[{place + 1}/{len(names)}] {args.name}"
        self.expected, self.later = seconds[place], sum(seconds[place + 1 :])
        self.start = time.monotonic()  # which no correction of the system's clock moves
        self.begin = self.start - max(0.0, args.elapsed)
        self.terminal = sys.stdout.isatty()
        self.columns = shutil.get_terminal_size().columns
        self.shown = -math.inf

    def line(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def announce(self) -> None:
        if not self.terminal:
            left = rounded(self.expected + self.later)
            self.line(f"{self.title}: about {rounded(self.expected)} on this machine, about {left} left in all")

    def status(self, bar: str) -> None:
        """Draw the changing line, at most five times a second."""
        now = time.monotonic()
        if not self.terminal or now - self.shown < 0.2:
            return
        self.shown = now
        left = max(0.0, self.expected - (now - self.start)) + self.later
        text = f"{self.title} (about {rounded(self.expected)}): {clock(now - self.begin)} so far, about "
        text += f"{rounded(left)} left" + (f" | {bar}" if bar else "")
        print(f"\r\033[K{text[: self.columns - 1]}", end="", flush=True)

    def finish(self, code: int) -> None:
        seconds = time.monotonic() - self.start
        self.line(f"{self.title}: {'failed after' if code else 'took'} {seconds:.0f} s")


class Output:
    """The command's output, cut into whole lines and the latest state of its progress bar."""

    def __init__(self, log: BinaryIO):
        self.log, self.decoder = log, codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = self.bar = ""

    def add(self, data: bytes) -> list[str]:
        """Take in what has come; returns the lines that are complete now, without what a bar wrote over."""
        self.log.write(data)
        *lines, self.rest = (self.rest + self.decoder.decode(data)).split("\n")
        found = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]
        # A bar is redrawn from the start of its line.
        frames = [frame.strip() for frame in self.rest.split("\r") if frame.strip()]
        self.bar = frames[-1] if "\r" in self.rest and frames else ("" if lines else self.bar)
        self.rest = self.rest.rpartition("\r")[2] if len(self.rest) > 100_000 else self.rest
        return found


def start(command: list[str], screen: Screen) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command; on a terminal it writes to one as well, so that it shows its bars.

    Returns:
        the process; the file descriptor of its output.
    """
    if not screen.terminal:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout
        return process, process.stdout.fileno()
    ours, theirs = pty.openpty()
    columns = max(30, screen.columns - 55)  # beside the time
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    return process, ours


def follow(process: subprocess.Popen[bytes], source: int, output: Output, screen: Screen) -> None:
    """Pass on what the command writes until it closes its output."""
    while True:
        if select.select([source], [], [], 1.0)[0]:
            try:
                data = os.read(source, 65536)
            except OSError:  # how Linux ends a terminal that nobody writes to any more
                data = b""
            if not data:
                return
            for line in output.add(data):
                if line.startswith(PASSED_ON):
                    screen.line(line)
        elif process.poll() is not None:  # something that it started holds the output open
            return
        screen.status(output.bar)


def lines_of(path: str | Path) -> list[str]:
    """The lines of a log, without empty ones and the states of bars that were drawn over."""
    with open(path, encoding="utf-8", errors="replace", newline="") as log:
        lines = [line.rstrip("\r\n").rpartition("\r")[2].rstrip() for line in log.read().split("\n")]
    return [line for line in lines if line]


def main() -> None:
    args = parse_args()
    screen = Screen(args)
    screen.announce()
    with open(args.log, "wb", buffering=0) as log:
        process, source = start(args.command, screen)
        try:
            follow(process, source, Output(log), screen)
            code = process.wait()
        except KeyboardInterrupt:  # the command has got the signal as well
            process.wait()
            screen.line("interrupted; run the same command again to resume")
            sys.exit(130)
    screen.finish(code)
    if code:
        print("\n".join(f"    {line}" for line in lines_of(args.log)[-LAST_LINES:]), file=sys.stderr, flush=True)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
