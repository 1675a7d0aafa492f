"""Errors that a user can correct, each reported in one line."""

from __future__ import annotations


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
