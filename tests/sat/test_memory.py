"""The memory estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from sparsity.models import empty_model
from sparsity.sat.memory import Settings, estimate, total_gib


@pytest.fixture(scope="module")
def model():
    """Of Llama-2-7B."""
    return empty_model(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))


PARAMETERS, PRUNED = 6_738_415_616, 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
RUN = Settings(processes=8)
LOW_RANK = Settings(lora_rank=64)


def test_parts_of_full_training(model):
    parts = estimate(model, RUN)
    trained = PARAMETERS - 32000 * 4096  # all but the embeddings
    assert parts["weights"] == 4 * PARAMETERS / 8 and parts["masks"] == PRUNED / 8
    assert parts["gradients"] == 4 * trained / 8 and parts["optimizer"] == 8 * trained / 8
    assert estimate(model, replace(RUN, distill=True))["teacher"] == 2 * PARAMETERS / 8


# GiB that torch's memory tracker counts in a simulated step (benchmarks/results/scale.json).
SIMULATED = [
    (RUN, 14.56),
    (replace(RUN, processes=64), 3.24),
    (replace(RUN, distill=True), 16.13),
    (replace(RUN, train_bs=4), 15.12),
    (replace(RUN, checkpointing=False), 17.13),
    (replace(RUN, lora_rank=64), 3.20),
    (LOW_RANK, 15.26),
    (replace(LOW_RANK, distill=True), 28.20),
]


@pytest.mark.parametrize(("run", "simulated"), SIMULATED)
def test_estimate_is_within_15_percent_of_the_simulation(model, run, simulated):
    assert total_gib(model, run) == pytest.approx(simulated, rel=0.15)


def test_low_rank_training_keeps_no_masks_and_little_optimizer_state(model):
    parts = estimate(model, LOW_RANK)
    factors = 64 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert parts["optimizer"] == 8 * factors and parts["masks"] == 0
    assert parts["weights"] == 2 * PARAMETERS + 4 * factors
