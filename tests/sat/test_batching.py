"""Packing, batches and their order."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

from sparsity.sat.batching import IGNORE, Collator, EpochSampler, Packed
from sparsity.sat.dataset import encode_records
from sparsity.sat.loss import model_inputs


def test_packing_keeps_every_sample_whole(tokenizer, records):
    dataset = encode_records(tokenizer, records, 400, 1)
    packed = Packed(dataset, 900)
    assert sorted(index for row in packed.rows for index in row) == list(range(len(dataset)))
    assert max(packed.lengths) <= 900 and len(packed) < len(dataset)
    assert packed[0]["input_ids"] == [dataset[index]["input_ids"] for index in packed.rows[0]]


def test_packed_samples_do_not_see_each_other(tokenizer, records):
    model = tiny_llama()
    dataset = encode_records(tokenizer, records[:4], 400, 1)
    collate = Collator(tokenizer.eos_token_id)
    row = {key: dataset[:3][key] for key in ("input_ids", "labels", "record", "plain")}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            together = model(**model_inputs(model, collate([row]))).logits[0]
            start = 0
            for index in range(3):
                alone = model(**model_inputs(model, collate([dataset[index]]))).logits[0]
                length = len(dataset[index]["input_ids"])
                torch.testing.assert_close(together[start : start + length], alone[:length], atol=1e-5, rtol=1e-4)
                start += length


def test_batches_are_padded_to_their_longest_sample(tokenizer, records):
    dataset = encode_records(tokenizer, records, 400, 1)
    items = [dataset[0], dataset[1]]
    batch = Collator(tokenizer.eos_token_id)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert longest <= batch["input_ids"].shape[1] < longest + 8
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["real"][row].sum() == length == batch["attention_mask"][row].sum()
        assert (batch["labels"][row, length:] == IGNORE).all()
    assert Collator(tokenizer.eos_token_id, 400)(items)["input_ids"].shape == (2, 400)


@pytest.mark.parametrize("group", [0, 4])
def test_sampler_depends_on_seed_and_epoch_alone(group):
    lengths = [(37 * index) % 101 + 1 for index in range(103)]
    sampler = EpochSampler(lengths, seed=1, group=group)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and list(sampler) == first
    sampler.epoch = 1
    second = list(sampler)
    assert second != first and sorted(second) == list(range(103))
    if group:
        padding = sum(
            max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
            for batch in (first[start : start + group] for start in range(0, 103, group))
        )
        assert padding < 0.1 * sum(lengths)
