"""Errors that a user can correct, each reported in one line."""

from __future__ import annotations

import errno
import re

# What torch, oneDNN, Python and the system say when memory runs out, in errors of many classes.
NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|(CUDA|HIP|error:) out of memory|bad_alloc|"
    r"MemoryError|could not create a primitive",
    re.IGNORECASE,
)
AMOUNT = re.compile(r"(?:allocate|mmap|size) ([\d.]+) ?([KMGT]iB|bytes|failed)", re.IGNORECASE)


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
    """What to say of an error that comes from a lack of memory, of this machine or of a GPU.

    Returns:
        e.g. "not enough memory (2.0 GiB more were asked for)"; None for any other error, and for a UserError that says
        so in words of its own.
    """
    if isinstance(error, UserError) and not NO_MEMORY.search(str(error)):
        return None
    while error is not None:
        text = str(error)
        out_of_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if out_of_memory or (not isinstance(error, UserError) and NO_MEMORY.search(text)):
            amount = f" ({_amount(*found.groups())} more were asked for)" if (found := AMOUNT.search(text)) else ""
            return f"not enough {'GPU ' if 'CUDA' in text else ''}memory{amount}"
        error = error.__cause__ or error.__context__
    return None


def _amount(size: str, unit: str) -> str:
    if unit.endswith("iB"):
        return f"{size} {unit}"
    mebibytes = float(size) / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
