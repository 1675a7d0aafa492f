"""Sparsity patterns: N of M consecutive weights, or a share of all."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsity.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: keep `n` of every `m` consecutive inputs, or (m == 0) prune a `fraction` of all weights."""

    n: int = 2
    m: int = 4
    fraction: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "N:M" or "unstructured:FRACTION".

        >>> Pattern.parse("2:4")
        Pattern(n=2, m=4, fraction=0.5)
        >>> str(Pattern.parse("unstructured:0.6"))
        'unstructured:0.6'

        Raises:
            UserError: any other text.
        """
        if match := re.fullmatch(r"([0-9]):([0-9])", text):
            n, m = int(match[1]), int(match[2])
            if 0 < n < m <= 8:
                return cls(n, m, 1 - n / m)
        match = re.fullmatch(r"unstructured:(0?\.[0-9]+)", text)
        if match and 0 < float(match[1]) < 1:
            return cls(0, 0, float(match[1]))
        raise UserError(f"--pattern '{text}' is not known; use 2:4, 4:8 (N:M with M up to 8) or unstructured:0.5")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"unstructured:{self.fraction}"
