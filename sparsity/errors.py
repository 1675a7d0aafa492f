"""Errors that a user can correct, each reported in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can correct. Its text is one line: what is wrong, which value, what to do."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
