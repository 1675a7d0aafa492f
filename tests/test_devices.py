"""Choosing a device."""

from __future__ import annotations

import pytest

from sparsity.devices import resolve_device
from sparsity.errors import UserError


def test_resolve_device():
    assert resolve_device("auto").type == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match="no CUDA GPU"):
            resolve_device(name)
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        resolve_device("gpu0")
