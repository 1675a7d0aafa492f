"""Records, plain texts, tables and prompt templates that are damaged: read right, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzzing import REFUSED, attempt, json_files, jsonl_files, parsed, parsed_lines
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.records import file_triples
from sparsity.text import INSTRUCTION, read_records, read_template, read_texts, valid_unicode

RECORDS = [
    {"instruction": "Summarize.", "input": "The river rose, “slowly”.", "output": "It rose."},
    {"instruction": "Shorten.", "input": "Two ships left.\n\nThey carried grain.", "output": "Ships left.", "id": 7},
]
TEXTS = ["One text.", {"text": "Another.\nOf two lines."}, {"article": "A third", "source": "é"}]
ROWS = [{"article": record["input"], "summary": record["output"], "id": 3.5} for record in RECORDS]
HUGE_NUMBER, DEEP = b'[{"input": ' + b"7" * 5000 + b"}]", b"[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@given(json_files(RECORDS))
@example(HUGE_NUMBER)
@example(DEEP)
@example(json.dumps([{**RECORDS[0], "output": "half a pair \ud800"}]).encode())
def test_records(folder, content):
    path = written(folder / "records.json", content)
    records = attempt(lambda: read_records(path), path)
    if records is not REFUSED:
        cleaned = [{k: valid_unicode(v) if isinstance(v, str) else v for k, v in r.items()} for r in parsed(content)]
        assert repr(records) == repr(cleaned)  # NaN is not equal to itself
        assert records and all(record["output"].strip() for record in records)
        assert all(isinstance(record[key], str) for record in records for key in ("instruction", "input", "output"))


@given(st.sampled_from([".json", ".jsonl"]), st.data())
def test_texts(folder, suffix, data):
    content = data.draw(jsonl_files(TEXTS) if suffix == ".jsonl" else json_files(TEXTS))
    path = written(folder / f"texts{suffix}", content)
    texts = attempt(lambda: read_texts(path), path)
    if texts is not REFUSED:
        items = parsed_lines(content) if suffix == ".jsonl" else parsed(content)
        names = ("text", "input", "article", "document", "content")
        expected = [
            item if isinstance(item, str) else item[next(name for name in names if name in item)] or ""
            for item in items
        ]
        assert texts == [valid_unicode(text) for text in expected if text.strip()]


@given(st.sampled_from([".json", ".jsonl"]), st.data())
def test_rows_of_any_json(folder, suffix, data):
    content = data.draw(jsonl_files(ROWS) if suffix == ".jsonl" else json_files(ROWS))
    path = written(folder / f"rows{suffix}", content)
    triples = attempt(lambda: list(file_triples([path], None, None, None)), path)
    assert triples is REFUSED or all(isinstance(text, str) for triple in triples for text in triple)


@given(json_files({"head": "Task: {instruction}\nText: ", "tail": "\nAnswer:"}))
@example(b'{"head": "{instruction} \\ud800", "tail": ""}')
@example(b'{"head": "{instruction}", "tail": "", "two\\nlines": ""}')
def test_templates(folder, tokenizer, content):
    path = written(folder / "template.json", content)
    template = attempt(lambda: read_template(path), path)
    if template is not REFUSED:
        value = parsed(content)
        assert (template.head, template.tail) == (valid_unicode(value["head"]), valid_unicode(value["tail"]))
        assert INSTRUCTION in template.head and tokenizer(template.prompt("Do.", "Text"))["input_ids"]
