"""Whether a matrix is 2:4, and what is counted in it."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_matrix

from sparsity.inspection import inspect_matrix
from sparsity.pattern import Pattern


def test_two_to_four_is_judged_within_groups_of_consecutive_inputs():
    assert Pattern().fits(torch.tensor([[1.0, 0, 0, 1, 0, 1, 1, 0]]))
    assert not Pattern().fits(
        torch.tensor([[0.0, 1, 1, 1, 1, 0, 0, 0]])
    )  # half zeros, but three values in the first group
    assert not Pattern().fits(torch.tensor([[0.0, 1, 0, 1, 0, 1]]))  # six inputs do not divide into groups
    assert Pattern().fits(sparse_matrix()) and not Pattern().fits(sparse_matrix().t().contiguous())


def test_unstructured_zeros_are_counted_in_each_matrix():
    weight = torch.ones(8, 10)
    weight[:, :5] = 0
    assert Pattern.parse("unstructured:0.5").fits(weight) and not Pattern.parse("unstructured:0.6").fits(weight)


def test_counts_of_one_matrix():
    weight = sparse_matrix(32, 64).half()
    weight[0][weight[0] == 0] = -0.0
    report = inspect_matrix("a.weight", weight)
    assert (report.shape, report.dtype, report.fits) == ((32, 64), "float16", True)
    assert report.zero_share == 0.5 and report.negative_zeros == 32
    mask = weight != 0
    dense = torch.randn(32, 64).half()
    masked = inspect_matrix("a.weight", dense, mask)
    assert masked.fits and masked.negative_zeros == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_other_dtypes(dtype):
    assert inspect_matrix("a.weight", (sparse_matrix() * 50).to(dtype)).fits
