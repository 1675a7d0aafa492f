"""Sparsity patterns. Imported before torch is, so that wrong options take no time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 16  # the largest m
DENSE = "dense"  # what is said in a pattern's place of a model without masks


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: keep `n` of every `m` consecutive inputs, or (m == 0) prune a `fraction` of all weights."""

    n: int = 2
    m: int = 4
    fraction: float = 0.5

    @classmethod
    def parse(cls, text: str, where: str = "--pattern") -> Pattern:
        """Read "N:M" or "unstructured:FRACTION"; `where` it stands begins the message about a wrong one.

        >>> Pattern.parse("2:4")
        Pattern(n=2, m=4, fraction=0.5)
        >>> str(Pattern.parse("unstructured:0.6"))
        'unstructured:0.6'

        Raises:
            UserError: any other text.
        """
        if match := re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text, re.ASCII):
            n, m = int(match[1]), int(match[2])
            if 0 < n < m <= MOST:
                return cls(n, m, 1 - n / m)
        match = re.fullmatch(r"unstructured:(0?\.[0-9]+)", text)
        if match and 0 < float(match[1]) < 1:
            return cls(0, 0, float(match[1]))
        raise UserError(f"{where}: got '{text}'; use 2:4, 4:8 (N:M with M up to {MOST}) or unstructured:0.5")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"unstructured:{self.fraction}"

    def fits(self, weight: Tensor) -> bool:
        """Whether a matrix [rows, inputs] has at least the zeros of the pattern.

        In matrices of experts [experts, …, …] groups run along either of the two last dimensions.

        >>> import torch
        >>> Pattern().fits(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), Pattern().fits(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
        (True, False)
        """
        if not self.m:
            return bool((weight == 0).double().mean() >= self.fraction)
        layouts = (weight, weight.transpose(-1, -2)) if weight.dim() > 2 else (weight,)
        return any(
            each.shape[-1] % self.m == 0 and bool(((each != 0).unflatten(-1, (-1, self.m)).sum(dim=-1) <= self.n).all())
            for each in layouts
        )
