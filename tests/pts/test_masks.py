"""Sparsity patterns and masks from scores."""

from __future__ import annotations

import pytest
import torch

from sparsity.errors import UserError
from sparsity.pts.masks import Pattern, magnitude_mask, wanda_mask

TWO_FOUR = Pattern.parse("2:4")


@pytest.mark.parametrize("text", ["2:5x", "4:2", "0:4", "unstructured:1.5", "half", "8:16"])
def test_unknown_pattern_is_refused(text):
    with pytest.raises(UserError, match="--pattern"):
        Pattern.parse(text)


def test_wanda_weighs_inputs_and_magnitude_does_not():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    hessian = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    assert wanda_mask(weight, hessian, TWO_FOUR).tolist() == [[True, False, False, True]]
    assert magnitude_mask(weight, TWO_FOUR).tolist() == [[False, False, True, True]]
