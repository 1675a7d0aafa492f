"""Sources of plain text."""

from __future__ import annotations

import copy
import json

import pytest

from sparsity.errors import UserError
from sparsity.sources import Source, content_key, is_streamed, parse_sources, read_source


def specs(*given: str) -> list[tuple[str, float]]:
    return [(source.spec, source.weight) for source in parse_sources(given)]


def test_lists_are_parsed_and_weights_normalized():
    assert specs("a.txt") == [("a.txt", 1.0)]
    assert specs("allenai/c4:en:train=3", "self=1") == [("allenai/c4:en:train", 0.75), ("self", 0.25)]
    assert specs("a=0.5", "b=0.5", "c=0") == [("a", 0.5), ("b", 0.5)]
    assert specs("a=3", "b") == [("a", 0.75), ("b", 0.25)]
    assert specs("a=3,b") == specs("a=3, b") == [("a", 0.75), ("b", 0.25)]
    assert parse_sources("a=3,b") == parse_sources(["a=3", "b"])


def test_paths_that_exist_may_hold_separators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b=1.txt", "c:d.txt", "e=2"):
        (tmp_path / name).write_text("text")
    assert specs("a,b=1.txt") == [("a,b=1.txt", 1.0)]
    assert specs("a,b=1.txt=3", "c:d.txt") == [("a,b=1.txt", 0.75), ("c:d.txt", 0.25)]
    assert specs("c:d.txt,e=2") == [("c:d.txt", 0.5), ("e=2", 0.5)]
    assert read_source(parse_sources("c:d.txt")[0], None, 0) == ["text"]


@pytest.mark.parametrize("text", ["", ",", "a,", "=1", "a=x", "a=-1", "a=nan", "a=inf", "a=0", "a=0,b=0"])
def test_wrong_lists_are_refused(text):
    with pytest.raises(UserError):
        parse_sources(text)


@pytest.fixture
def articles():
    return [f"Article {number}. " + "word " * 700 for number in range(40)]


def save_as(kind: str, folder, articles):
    from datasets import Dataset

    data = Dataset.from_dict({"id": list(range(len(articles))), "article": articles})
    folder.mkdir()
    if kind == "saved":
        data.save_to_disk(str(folder))
    elif kind == "txt":
        for number, article in enumerate(articles):
            (folder / f"{number:02}.txt").write_text(article + "\n\nend")
    elif kind == "arrow":
        import pyarrow

        table = pyarrow.table({"article": articles})
        with (
            pyarrow.OSFile(str(folder / "train.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table)
    else:
        getattr(data, f"to_{kind}")(str(folder / f"train.{kind}"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets cache")


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "arrow", "saved", "txt"])
def test_folders_open_as_data_sets(tmp_path, articles, kind):
    """The code is that of hub data sets, which are read in the same way."""
    save_as(kind, tmp_path / "set", articles)
    source = Source(str(tmp_path / "set"))
    expected = [article + "\n\nend" for article in articles] if kind == "txt" else articles
    assert read_source(source, None, 0) == expected
    assert not is_streamed(source)
    # 1000 tokens: twice 4000 characters, no more than 3200 of a text counted.
    part = read_source(source, 1000, seed=1)
    assert len(part) == 3 and set(part) <= set(expected)
    assert part == read_source(source, 1000, seed=1) != read_source(source, 1000, seed=2)
    assert read_source(source, 1000, seed=None) == expected[:3]


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_files_of_data_sets_open_too(tmp_path, articles, kind):
    save_as(kind, tmp_path / "set", articles)
    assert read_source(Source(str(tmp_path / "set" / f"train.{kind}")), None, 0) == articles


def test_splits_and_columns_are_chosen(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"text": "{split}", "summary": "short {split}"}}\n')
    assert read_source(Source(str(folder)), None, 0) == ["train"]
    assert read_source(Source(f"{folder}::test"), None, 0) == ["test"]
    assert read_source(Source(str(folder)), None, 0, "test", "summary") == ["short test"]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        read_source(Source(f"{folder}::dev"), None, 0)


def test_content_key_follows_the_content(tmp_path, articles):
    save_as("parquet", tmp_path / "set", articles[:2])
    source = Source(str(tmp_path / "set"))
    before = content_key(source)
    assert content_key(Source(source.spec, 0.5)) == before
    (tmp_path / "set" / "more.parquet").write_bytes(b"x")
    assert content_key(source) != before
    assert content_key(Source("allenai/c4:en")) != content_key(Source("allenai/c4:de"))


def test_text_of_the_model_is_not_written_here():
    with pytest.raises(UserError, match="'self' .* is not available here"):
        read_source(parse_sources("self")[0], 100, 0)


def test_every_name_of_modelopt_s_registry_gives_text(monkeypatch, tokenizer):
    """All splits of a set and all sets of a group, chats in the tokenizer's template where it has one."""
    import datasets
    from modelopt.torch.utils import get_supported_datasets

    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    columns = {"text": "Plain.", "article": "News.", "problem": "1+1", "generated_solution": "2", "output": "Done."}

    def load(path, name=None, *, split, streaming, data_files=None):
        row = {**columns, "input": turns if "Llama" in path else "Code."}
        row |= {"conversations": sharegpt} if "Magpie" in path else {"messages": turns} if "Nemotron-" in path else {}
        row = {name: value for name, value in row.items() if "Llama" not in path or name != "messages"}
        return datasets.Dataset.from_list([row] * 3).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in get_supported_datasets():
        assert set(read_source(Source(name), None, None)) <= {
            *("Plain.", "News.", "1+1\n2", "Code.\nDone.", "Why?\nBecause.", "Why?\nBecause.\nDone.")
        }, name
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for name in ("magpie", "nemotron-post-training-dataset-v2"):
        texts = read_source(Source(name), None, None, tokenizer=templated)
        assert set(texts) == {"<user>Why?<assistant>Because."}
    assert len(read_source(Source("nemotron-post-training-dataset-v2"), None, None)) == 4 * 3


def test_of_a_chat_with_images_and_calls_the_text_is_read(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [{"name": "see"}]}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [*chat, {"role": "assistant", "content": "So."}]}))
    assert read_source(Source(str(tmp_path / "chats.jsonl")), None, None) == ["Why?\n\nSo."]


@pytest.mark.parametrize(("chat", "words"), [([{"role": "user"}], "holds no chat"), (["Hello"], "holds no chat")])
def test_a_chat_without_content_is_named(tmp_path, chat, words):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(UserError, match=f"item 0: column 'messages' {words}"):
        read_source(Source(str(tmp_path / "chats.jsonl")), None, None)
