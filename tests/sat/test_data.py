"""Training samples: tokenizing, the cache on disk, mixing with plain text, packing, batches and their order."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import TEXTS, tiny_llama

from sparsity.attention import NAME
from sparsity.sat import data
from sparsity.sat.data import IGNORE, Collator, EpochSampler, Packed, Text, encode_records
from sparsity.sat.loss import model_inputs
from sparsity.sources import Source
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate, encode_prompt, token_blocks


@pytest.fixture
def data_file(tmp_path, records):
    path = tmp_path / "cnn_train.json"
    path.write_text(json.dumps(records))
    return path


def blocks_of(tokenizer, texts, size=32):
    return data.text_dataset(token_blocks(tokenizer, texts, size).tolist())


def must_not_run(*_):
    raise AssertionError("tokenized again")


# ----------------------------------------------------------------------------------------------------------- samples


def test_loss_is_on_the_answer_and_its_end_alone(tokenizer, records):
    sample, _ = data.encode_record(tokenizer, records[0], 400)
    prompt, _ = encode_prompt(tokenizer, records[0], 400)
    assert sample["input_ids"][: len(prompt)] == prompt
    assert set(sample["labels"][: len(prompt)]) == {IGNORE}
    answer = sample["input_ids"][len(prompt) :]
    assert answer == sample["labels"][len(prompt) :]
    assert tokenizer.decode(answer[:-1]) == records[0]["output"]
    assert answer[-1] == tokenizer.eos_token_id


def test_only_the_article_is_cut(tokenizer, records):
    whole, _ = data.encode_record(tokenizer, records[0], 400)
    cut, _ = data.encode_record(tokenizer, records[0], len(whole["input_ids"]) - 20)
    assert len(cut["input_ids"]) <= len(whole["input_ids"]) - 20
    assert [label for label in cut["labels"] if label != IGNORE] == [i for i in whole["labels"] if i != IGNORE]
    text = tokenizer.decode(cut["input_ids"])
    assert "### Response:" in text and records[0]["instruction"] in text


@pytest.mark.parametrize("length", [1, 30, 64])
def test_a_quarter_is_the_answer_where_the_template_alone_is_longer(tokenizer, records, capsys, length):
    dataset = encode_records(tokenizer, records, length, 1, name="train.json")
    answers = [tokenizer(record["output"], add_special_tokens=False)["input_ids"] for record in records]
    for sample, answer in zip(dataset, answers, strict=True):
        labels = [label for label in sample["labels"] if label != IGNORE]
        assert len(sample["input_ids"]) == length and len(labels) >= length / 4
        assert labels == [*answer, tokenizer.eos_token_id][: len(labels)]
        before = tokenizer.decode(sample["input_ids"][: length - len(labels)])
        assert DEFAULT_TEMPLATE.tail.endswith(before) or before.endswith(DEFAULT_TEMPLATE.tail)
    error = capsys.readouterr().err
    assert error.count("and 10 the start of the prompt") == error.count("is short for train.json") == 1


def test_an_overlong_answer_loses_its_end_and_an_overlong_prompt_its_start(tokenizer, records, capsys):
    many = [dict(record) for record in records]
    many[7]["output"] = "word " * 500
    many[8]["instruction"] = "Summarize. " * 200
    dataset = encode_records(tokenizer, many, 400, 1)
    cut = dataset[7]
    assert cut["length"] == len(cut["input_ids"]) == 400 and cut["labels"][-1] != tokenizer.eos_token_id
    text = tokenizer.decode(cut["input_ids"])
    assert f"### Input:\n{DEFAULT_TEMPLATE.tail}word word" in text, "the article went first"
    assert many[8]["output"] in tokenizer.decode(dataset[8]["input_ids"])
    warning = "of 10 records 1 lost the end of their answer and 1 the start of the prompt"
    assert capsys.readouterr().err.count(warning) == 1


def test_workers_give_the_same_samples(tokenizer, records):
    many = records * 30
    assert encode_records(tokenizer, many, 400, 1)[:] == encode_records(tokenizer, many, 400, 2)[:]


# ------------------------------------------------------------------------------------------------------------- cache


def test_cache_is_read_again_and_never_stale(tokenizer, data_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = data.load_records(tokenizer, data_file, 400, cache, 1)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["river"])
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_records", must_not_run)
        assert data.load_records(tokenizer, data_file, 400, cache, 1)[:] == first[:]
        template = PromptTemplate(DEFAULT_TEMPLATE.head, "\n\n### Answer:\n")
        for different in [(tokenizer, data_file, 399, cache, 1), (other, data_file, 400, cache, 1)]:
            with pytest.raises(AssertionError):
                data.load_records(*different)
        with pytest.raises(AssertionError):
            data.load_records(tokenizer, data_file, 400, cache, 1, template)
    changed = json.loads(data_file.read_text())
    changed[0]["output"] = "Another answer."
    data_file.write_text(json.dumps(changed))
    again = data.load_records(tokenizer, data_file, 400, cache, 1)
    assert again[0]["labels"] != first[0]["labels"] and again[1] == first[1]


def test_runs_that_build_the_same_data_at_once_share_it(tokenizer, tmp_path):
    """Each starts before any has finished; the slower one takes what the first one kept."""

    def slow_and_overtaken():
        data.cached(tmp_path, ["key"], lambda: blocks_of(tokenizer, TEXTS * 4))
        return blocks_of(tokenizer, TEXTS * 4)

    dataset = data.cached(tmp_path, ["key"], slow_and_overtaken)
    assert dataset[:] == blocks_of(tokenizer, TEXTS * 4)[:]
    assert len(list(tmp_path.iterdir())) == 1, "nothing half built is left"


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.unlink()], ids=["flipped bit", "missing file"])
def test_a_damaged_cache_is_replaced(tokenizer, tmp_path, damage):
    texts = tmp_path / "a.txt"
    texts.write_text(" ".join(TEXTS))
    options = (tokenizer, Source(str(texts)), 16, tmp_path / "cache", None, 0)
    first = data.load_texts(*options)[:]
    (folder,) = (tmp_path / "cache").iterdir()
    damage(next(folder.glob("*.arrow")))
    assert data.load_texts(*options)[:] == first
    assert list((tmp_path / "cache").iterdir()) == [folder]


# ------------------------------------------------------------------------------------------------------------ mixing


def test_text_ratio_is_a_fraction_of_tokens(tokenizer, records):
    dataset, texts = encode_records(tokenizer, records, 400, 1), blocks_of(tokenizer, TEXTS * 40)
    mixed = data.mix(dataset, [Text(texts, 1.0)], 0.3, seed=0)
    text_tokens = sum(len(ids) for ids in mixed[len(dataset) :]["input_ids"])
    fraction = text_tokens / sum(len(ids) for ids in mixed["input_ids"])
    assert abs(fraction - 0.3) < 0.02
    assert len(data.mix(dataset, [Text(texts, 1.0)], 1.0, seed=0)) == len(texts)


def test_texts_are_drawn_by_weight(tokenizer):
    long, short = (blocks_of(tokenizer, TEXTS * count) for count in (40, 20))
    drawn = data.draw_blocks([Text(long, 0.75), Text(short, 0.25)], 40, seed=0)
    assert len(drawn) == 40
    first = {tuple(ids) for ids in long["input_ids"]}
    assert sum(tuple(ids) in first for ids in drawn[:30]["input_ids"]) == 30
    even = data.draw_blocks([Text(long, 0.5), Text(short, 0.5)], None, seed=0)
    assert len(even) == pytest.approx(2 * len(short), abs=1), "the shorter text bounds an even mixture"
    repeated = data.draw_blocks([Text(long, 0.5), Text(short, 0.5, generated=True)], None, seed=0)
    assert len(repeated) == 2 * len(long), "generated text is read again as often as needed"


# ----------------------------------------------------------------------------------------------------------- batches


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
    for attention in ("sdpa", "eager", NAME):
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
        batches = [[lengths[i] for i in first[start : start + group]] for start in range(0, 103, group)]
        assert sum(max(batch) * len(batch) - sum(batch) for batch in batches) < 0.1 * sum(lengths), "little padding"
