"""Samples, cache, mixing, packing and batches of sat_data."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS, tiny_llama

import sat_data
from sat_data import IGNORE, Collator, EpochSampler, Packed
from text_input import encode_prompt
from utils import UserError


@pytest.fixture
def data_file(tmp_path, records):
    path = tmp_path / "cnn_train.json"
    path.write_text(json.dumps(records))
    return path


def test_loss_is_on_the_answer_and_its_end_alone(tokenizer, records):
    sample = sat_data.encode_record(tokenizer, records[0], 400)
    prompt = encode_prompt(tokenizer, records[0], 400)
    assert sample["input_ids"][: len(prompt)] == prompt
    assert set(sample["labels"][: len(prompt)]) == {IGNORE}
    answer = sample["input_ids"][len(prompt) :]
    assert answer == sample["labels"][len(prompt) :]
    assert tokenizer.decode(answer[:-1]) == records[0]["output"]
    assert answer[-1] == tokenizer.eos_token_id


def test_only_the_article_is_cut(tokenizer, records):
    whole = sat_data.encode_record(tokenizer, records[0], 400)
    cut = sat_data.encode_record(tokenizer, records[0], len(whole["input_ids"]) - 20)
    assert len(cut["input_ids"]) <= len(whole["input_ids"]) - 20
    assert [label for label in cut["labels"] if label != IGNORE] == [i for i in whole["labels"] if i != IGNORE]
    text = tokenizer.decode(cut["input_ids"])
    assert "### Response:" in text and records[0]["instruction"] in text


def test_too_small_max_length_is_refused(tokenizer, records, data_file, tmp_path):
    with pytest.raises(UserError, match="--max_length 30 is too small: 10 of 10 records"):
        sat_data.load_records(tokenizer, data_file, 30, tmp_path / "cache", 1)


def test_a_rare_overlong_answer_is_left_out(tokenizer, records, capsys):
    many = [dict(record) for record in records * 11]
    many[7]["output"] = "word " * 500
    dataset = sat_data.encode_records(tokenizer, many, 400, 1)
    assert len(dataset) == 109 and 7 not in dataset["record"]
    assert "left out 1 record" in capsys.readouterr().out


def test_workers_give_the_same_samples(tokenizer, records):
    many = records * 30
    alone = sat_data.encode_records(tokenizer, many, 400, 1)
    together = sat_data.encode_records(tokenizer, many, 400, 2)
    assert alone[:] == together[:]


def test_cache_is_read_again_and_never_stale(tokenizer, data_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = sat_data.load_records(tokenizer, data_file, 400, cache, 1)

    def fail(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(sat_data, "encode_records", fail)
        assert sat_data.load_records(tokenizer, data_file, 400, cache, 1)[:] == first[:]
        with pytest.raises(AssertionError):
            sat_data.load_records(tokenizer, data_file, 399, cache, 1)
        with pytest.raises(AssertionError), patch.context() as other:
            other.setattr(sat_data, "PROMPT_TAIL", "\n\n### Answer:\n")
            sat_data.load_records(tokenizer, data_file, 400, cache, 1)
    changed = json.loads(data_file.read_text())
    changed[0]["output"] = "Another answer."
    data_file.write_text(json.dumps(changed))
    again = sat_data.load_records(tokenizer, data_file, 400, cache, 1)
    assert again[0]["labels"] != first[0]["labels"] and again[1] == first[1]


def test_cache_keys_on_the_tokenizer(tokenizer, data_file, tmp_path):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["river"])
    assert sat_data.tokenizer_digest(other) != sat_data.tokenizer_digest(tokenizer)
    first = sat_data.load_records(tokenizer, data_file, 400, tmp_path / "cache", 1)
    assert sat_data.load_records(other, data_file, 400, tmp_path / "cache", 1)[:] != first[:]


def test_text_ratio_is_a_share_of_tokens(tokenizer, records):
    dataset = sat_data.encode_records(tokenizer, records, 400, 1)
    texts = sat_data.encode_texts(tokenizer, TEXTS * 40, 32)
    mixed = sat_data.mix(dataset, texts, 0.3, seed=0)
    text_tokens = sum(len(ids) for ids in mixed[len(dataset) :]["input_ids"])
    share = text_tokens / sum(len(ids) for ids in mixed["input_ids"])
    assert abs(share - 0.3) < 0.02
    assert len(sat_data.mix(dataset, texts, 1.0, seed=0)) == len(texts)


def test_packing_keeps_every_sample_whole(tokenizer, records):
    dataset = sat_data.encode_records(tokenizer, records, 400, 1)
    packed = Packed(dataset, 900)
    assert sorted(index for row in packed.rows for index in row) == list(range(len(dataset)))
    assert max(packed.lengths) <= 900 and len(packed) < len(dataset)
    assert packed[0]["input_ids"] == [dataset[index]["input_ids"] for index in packed.rows[0]]


def test_packed_samples_do_not_see_each_other(tokenizer, records):
    from sat_loss import model_inputs

    model = tiny_llama()
    dataset = sat_data.encode_records(tokenizer, records[:4], 400, 1)
    collate = Collator(tokenizer.eos_token_id)
    row = {key: dataset[:3][key] for key in ("input_ids", "labels", "record")}
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
    dataset = sat_data.encode_records(tokenizer, records, 400, 1)
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
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == list(range(103))
    if group:
        padding = sum(
            max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
            for batch in (first[start : start + group] for start in range(0, 103, group))
        )
        assert padding < 0.1 * sum(lengths)
