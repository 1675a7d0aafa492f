"""The memory estimate and its advice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsity.sat.memory import GIB, Settings, Shapes, advice, estimate


def test_memory_estimate_counts_and_advises():
    shapes = Shapes(6_738_415_616, 202_383_360, 6_476_005_376, 262_148_096, 32, 4096, 11008, 32000)
    run = Settings(8, 4, 1024, 2, "adamw_torch_fused", 8, False, False, False, False, False)
    parts = estimate(shapes, run)
    assert parts["weights, fp32"] / GIB == pytest.approx(6.738 * 4 / 8 / 1.0737, rel=0.01)
    assert parts["optimizer, adamw_torch_fused"] == 2 * parts["weights, fp32"]
    frozen = estimate(replace(shapes, embeddings=131_072_000), replace(run, freeze_embeddings=True))
    saved = parts["gradients, fp32"] - frozen["gradients, fp32"]
    assert saved == pytest.approx(131_072_000 * 4 / 8) and frozen["weights, fp32"] == parts["weights, fp32"]
    assert "--gradient_checkpointing saves about" in advice(shapes, run)
