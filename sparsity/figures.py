"""The figures that evaluation writes and that reports and model cards read: their names."""

from __future__ import annotations

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
