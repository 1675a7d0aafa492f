"""Errors that a user can correct, each reported in one line."""

from __future__ import annotations

import errno
import re

# What torch, Python and the system say when memory runs out, in errors of many classes.
NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc", re.I)
AMOUNT = re.compile(r"(?:allocate|mmap|size) ([\d.]+) ?([KMGT]iB|bytes|failed)", re.I)


class UserError(Exception):
    """A mistake the user can correct. Its text is one line: what is wrong, which value, what to do.

    The value may come from a damaged or foreign file, so line breaks and control characters in it are spelled out.
    """

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def memory_shortage(error: BaseException | None) -> str | None:
    """What to say of an error if it, or what it was raised from, is that memory has run out: of this machine or a GPU.

    Returns:
        e.g. "not enough memory (2.0 GiB more were asked for)"; None for any other error.
    """
    while error is not None:
        text = str(error)
        of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        foreign = not isinstance(error, (UserError, OSError)) and NO_MEMORY.search(text)
        if isinstance(error, MemoryError) or of_system or foreign:
            found = AMOUNT.search(text)
            amount = ""
            if found:
                size, unit = found.groups()
                asked = f"{size} {unit}" if unit.endswith("iB") else f"{float(size) / 2**30:.1f} GiB"
                amount = f" ({asked} more were asked for)"
            return f"not enough {'GPU ' if 'CUDA' in text else ''}memory{amount}"
        error = error.__cause__ or error.__context__
    return None
