"""Training samples: tokenizing, the cache on disk, and mixing with plain text."""

from __future__ import annotations

import json

import pytest
from conftest import TEXTS

from sparsity.errors import UserError
from sparsity.sat import dataset as sat_dataset
from sparsity.sat.batching import IGNORE
from sparsity.sources import Source
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate, encode_prompt


@pytest.fixture
def data_file(tmp_path, records):
    path = tmp_path / "cnn_train.json"
    path.write_text(json.dumps(records))
    return path


def test_loss_is_on_the_answer_and_its_end_alone(tokenizer, records):
    sample = sat_dataset.encode_record(tokenizer, records[0], 400)
    prompt = encode_prompt(tokenizer, records[0], 400)
    assert sample["input_ids"][: len(prompt)] == prompt
    assert set(sample["labels"][: len(prompt)]) == {IGNORE}
    answer = sample["input_ids"][len(prompt) :]
    assert answer == sample["labels"][len(prompt) :]
    assert tokenizer.decode(answer[:-1]) == records[0]["output"]
    assert answer[-1] == tokenizer.eos_token_id


def test_only_the_article_is_cut(tokenizer, records):
    whole = sat_dataset.encode_record(tokenizer, records[0], 400)
    cut = sat_dataset.encode_record(tokenizer, records[0], len(whole["input_ids"]) - 20)
    assert len(cut["input_ids"]) <= len(whole["input_ids"]) - 20
    assert [label for label in cut["labels"] if label != IGNORE] == [i for i in whole["labels"] if i != IGNORE]
    text = tokenizer.decode(cut["input_ids"])
    assert "### Response:" in text and records[0]["instruction"] in text


def test_too_small_max_length_is_refused(tokenizer, records, data_file, tmp_path):
    with pytest.raises(UserError, match="--max_length 30 is too small: .* each of the 10 records"):
        sat_dataset.load_records(tokenizer, data_file, 30, tmp_path / "cache", 1)


def test_an_overlong_answer_loses_its_end_and_what_has_no_room_is_left_out(tokenizer, records, capsys):
    many = [dict(record) for record in records]
    many[7]["output"] = "word " * 500
    many[8]["instruction"] = "Summarize. " * 200
    dataset = sat_dataset.encode_records(tokenizer, many, 400, 1)
    assert len(dataset) == 9 and 8 not in dataset["record"]
    cut = dataset[7]
    assert cut["length"] == len(cut["input_ids"]) == 400 and cut["labels"][-1] != tokenizer.eos_token_id
    text = tokenizer.decode(cut["input_ids"])
    assert f"### Input:\n{DEFAULT_TEMPLATE.tail}word word" in text, "the article went first"
    warning = "of 10 records 1 lost the end of their answer and 1 were left out"
    assert capsys.readouterr().err.count(warning) == 1


def test_workers_give_the_same_samples(tokenizer, records):
    many = records * 30
    alone = sat_dataset.encode_records(tokenizer, many, 400, 1)
    together = sat_dataset.encode_records(tokenizer, many, 400, 2)
    assert alone[:] == together[:]


def test_cache_is_read_again_and_never_stale(tokenizer, data_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = sat_dataset.load_records(tokenizer, data_file, 400, cache, 1)

    def fail(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(sat_dataset, "encode_records", fail)
        assert sat_dataset.load_records(tokenizer, data_file, 400, cache, 1)[:] == first[:]
        with pytest.raises(AssertionError):
            sat_dataset.load_records(tokenizer, data_file, 399, cache, 1)
        with pytest.raises(AssertionError):
            other = PromptTemplate(DEFAULT_TEMPLATE.head, "\n\n### Answer:\n")
            sat_dataset.load_records(tokenizer, data_file, 400, cache, 1, other)
    changed = json.loads(data_file.read_text())
    changed[0]["output"] = "Another answer."
    data_file.write_text(json.dumps(changed))
    again = sat_dataset.load_records(tokenizer, data_file, 400, cache, 1)
    assert again[0]["labels"] != first[0]["labels"] and again[1] == first[1]


def test_cache_keys_on_the_tokenizer(tokenizer, data_file, tmp_path):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["river"])
    assert sat_dataset.tokenizer_digest(other) != sat_dataset.tokenizer_digest(tokenizer)
    first = sat_dataset.load_records(tokenizer, data_file, 400, tmp_path / "cache", 1)
    assert sat_dataset.load_records(other, data_file, 400, tmp_path / "cache", 1)[:] != first[:]


def test_text_ratio_is_a_share_of_tokens(tokenizer, records):
    dataset = sat_dataset.encode_records(tokenizer, records, 400, 1)
    texts = sat_dataset.encode_texts(tokenizer, TEXTS * 40, 32)
    mixed = sat_dataset.mix(dataset, [sat_dataset.Text(texts, 1.0)], 0.3, seed=0)
    text_tokens = sum(len(ids) for ids in mixed[len(dataset) :]["input_ids"])
    share = text_tokens / sum(len(ids) for ids in mixed["input_ids"])
    assert abs(share - 0.3) < 0.02
    assert len(sat_dataset.mix(dataset, [sat_dataset.Text(texts, 1.0)], 1.0, seed=0)) == len(texts)


def test_texts_are_drawn_by_weight(tokenizer):
    long, short = (sat_dataset.encode_texts(tokenizer, TEXTS * count, 32) for count in (40, 20))
    drawn = sat_dataset.draw_blocks([sat_dataset.Text(long, 0.75), sat_dataset.Text(short, 0.25)], 40, seed=0)
    assert len(drawn) == 40
    first = {tuple(ids) for ids in long["input_ids"]}
    assert sum(tuple(ids) in first for ids in drawn[:30]["input_ids"]) == 30
    whole = sat_dataset.draw_blocks([sat_dataset.Text(long, 0.5), sat_dataset.Text(short, 0.5)], None, seed=0)
    assert len(whole) == pytest.approx(2 * len(short), abs=1), "the shorter text bounds an even mixture"


def test_runs_that_build_the_same_data_at_once_share_it(tokenizer, tmp_path):
    """Each starts before any has finished; the slower ones take what the first one kept."""
    build = sat_dataset.encode_texts

    def slow_and_overtaken():
        sat_dataset.cached(tmp_path, ["key"], lambda: build(tokenizer, TEXTS * 4, 16))
        return build(tokenizer, TEXTS * 4, 16)

    dataset = sat_dataset.cached(tmp_path, ["key"], slow_and_overtaken)
    assert dataset[:] == build(tokenizer, TEXTS * 4, 16)[:]
    assert len(list(tmp_path.iterdir())) == 1, "nothing half built is left"


def test_a_damaged_cache_is_replaced(tokenizer, tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text(" ".join(TEXTS))
    cache = tmp_path / "cache"
    first = sat_dataset.load_texts(tokenizer, Source(str(texts)), 16, cache, None, 0)[:]
    (folder,) = cache.iterdir()
    for file in folder.glob("*.arrow"):
        file.write_bytes(b"")
    assert sat_dataset.load_texts(tokenizer, Source(str(texts)), 16, cache, None, 0)[:] == first
    assert list(cache.iterdir()) == [folder]


def test_a_cache_of_an_earlier_release_is_used(tmp_path):
    blocks = [[0, 1], [2, 3]]
    first = sat_dataset.cached(tmp_path, ["key"], lambda: sat_dataset.text_dataset(blocks))[:]
    (folder,) = tmp_path.iterdir()
    (folder / sat_dataset.DIGESTS).unlink()
    assert sat_dataset.cached(tmp_path, ["key"], lambda: pytest.fail("tokenized again"))[:] == first


def test_missing_rows_of_a_cache_are_noticed(tmp_path):
    """An Arrow file that ends behind a batch of rows opens without an error."""
    import pyarrow

    blocks = [[index, index] for index in range(4)]
    sat_dataset.cached(tmp_path, ["key"], lambda: sat_dataset.text_dataset(blocks))
    (file,) = tmp_path.glob("*/*.arrow")
    with pyarrow.memory_map(str(file)) as source:
        table = pyarrow.ipc.open_stream(source).read_all().slice(0, 2)
    with pyarrow.OSFile(str(file), "wb") as target, pyarrow.ipc.new_stream(target, table.schema) as stream:
        stream.write_table(table)
    assert len(sat_dataset.cached(tmp_path, ["key"], lambda: sat_dataset.text_dataset(blocks))) == 4
