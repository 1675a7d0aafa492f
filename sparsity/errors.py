"""Errors that a user can correct, each reported in one line."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Messages of torch, oneDNN, Python and Linux when memory runs out, in exceptions of many classes.
NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|(CUDA|HIP|error:) out of memory|bad_alloc|"
    r"MemoryError|could not create a primitive",
    re.IGNORECASE,
)


class UserError(Exception):
    """A mistake the user can correct. Its text is one line: what is wrong, which value, what to do.

    The value may come from a damaged or foreign file, so line breaks and control characters in it are spelled out.
    """

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, with the next where it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return " ".join(lines[: end + 1]) or type(error).__name__


@contextlib.contextmanager
def reported_as(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of libraries into a UserError: `message`, the first line of theirs, and of their first cause.

    The cause is, for example, what a server answered.
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        cause = f" ({first_line(root)})" if root is not error else ""
        raise UserError(f"{message}: {first_line(error)}{cause}") from error


def with_downloads(load: Callable, *args: Any, **options: Any) -> Any:
    """Call `load`, again after a pause where a server fails: the hub's library repeats its requests, but no downloads.

    What is complete stays in the cache.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for pause in (1, 5, 25):
        try:
            return load(*args, **options)
        except OSError as error:
            answer: BaseException | None = error
            while not isinstance(answer, HfHubHTTPError | None):
                answer = answer.__cause__
            if answer is None or answer.response.status_code < 500:
                raise
            time.sleep(pause)
    return load(*args, **options)


def few(names: list[str]) -> str:
    """The first three of some names, for one-line messages."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def memory_shortage(error: BaseException | None) -> str | None:
    """Describe an error that comes from a lack of memory, of this machine or of a GPU.

    Returns:
        "out of memory" or "GPU out of memory"; None for any other error, and for a UserError, which has its own advice,
        unless it only quotes the library's message.
    """
    if isinstance(error, UserError) and not NO_MEMORY.search(str(error)):
        return None
    while error is not None:
        text = str(error)
        is_system_error = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if is_system_error or (not isinstance(error, UserError) and NO_MEMORY.search(text)):
            return "GPU out of memory" if "CUDA" in text else "out of memory"
        error = error.__cause__ or error.__context__
    return None


def warn(message: str) -> None:
    """Print one line of warning to stderr, on the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


warn_once = functools.cache(warn)
