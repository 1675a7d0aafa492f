"""The memory estimate and its advice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from sparsity.sat.memory import CARDS, GIB, USABLE, Settings, advice, estimate, model_shapes, table, verdict


@pytest.fixture(scope="module")
def shapes():
    """Of Llama-2-7B."""
    return model_shapes(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))


RUN = Settings(8, 1, 1024, 2, "adamw_torch_fused", 8, True, False, False, False, freeze_embeddings=True)
LOW_RANK = replace(RUN, processes=1, lora_rank=64)


def total(shapes, run):
    return sum(estimate(shapes, run).values()) / GIB


def test_parts_of_full_training(shapes):
    parts = estimate(shapes, RUN)
    assert shapes.parameters == 6_738_415_616
    assert parts["weights"] == 4 * shapes.parameters / 8
    trained = shapes.parameters - 32000 * 4096  # all but the embeddings
    assert parts["gradients"] == 4 * trained / 8 and parts["optimizer, adamw_torch_fused"] == 8 * trained / 8
    assert parts["masks"] == shapes.pruned / 8
    kept = total(shapes, replace(RUN, checkpointing=False)), total(shapes, replace(RUN, train_bs=4))
    assert kept[0] > total(shapes, RUN) and kept[1] > total(shapes, RUN)
    assert total(shapes, replace(RUN, distill=True)) - total(shapes, RUN) > 2 * shapes.parameters / 8 / GIB * 0.9


def test_low_rank_training_of_7b_fits_a_card_of_24_gb(shapes):
    assert total(shapes, LOW_RANK) < USABLE * 24
    parts = estimate(shapes, LOW_RANK)
    factors = 64 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    norms = (2 * 32 + 1) * 4096
    assert parts["optimizer, adamw_torch_fused"] == 8 * (factors + norms)
    assert parts["weights"] == 2 * (shapes.parameters - norms) + 4 * (factors + norms)
    assert parts["masks"] == 0  # the frozen weights carry them


def test_table_of_cards(shapes):
    full, low_rank = table(shapes, replace(RUN, processes=1)).splitlines()[-2:]
    assert full.split()[:2] == ["full", "training"] and low_rank.split()[:2] == ["--lora_rank", "64"]
    assert low_rank.count("yes, up to") == len(CARDS)
    assert [cell.split()[0] for cell in full.split("no; ")[1:]] == ["8", "4", "2"]  # GPUs


@pytest.mark.parametrize(("card", "fits"), [(24, False), (40, False), (80, True)])
def test_verdicts_hold_what_they_promise(shapes, card, fits):
    run = replace(RUN, processes=2, train_bs=2)
    words = verdict(shapes, run, card)
    assert words.startswith("yes") == fits
    if fits:
        longest = int(words.split()[3])
        assert total(shapes, replace(run, max_length=longest)) <= USABLE * card
    else:
        count = int(words.split()[-2])
        assert total(shapes, replace(run, processes=count)) <= USABLE * card
        assert total(shapes, replace(run, processes=count // 2)) > USABLE * card


def test_advice_names_what_saves_most(shapes):
    line = advice(shapes, replace(RUN, processes=1))
    assert f"needs about {total(shapes, replace(RUN, processes=1)):.1f} GiB" in line
    saved = total(shapes, replace(RUN, processes=1)) - total(shapes, LOW_RANK)
    assert f"Most effective: --lora_rank 64 saves about {saved:.1f} GiB" in line
