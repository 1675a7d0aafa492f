"""Records, plain texts, tables and prompt templates."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from fuzzing import REFUSED, attempt, damaged, fuzz, json_files, jsonl_files, parsed, parsed_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsity.records import file_triples
from sparsity.sources import Source, read_source
from sparsity.text import (
    DEFAULT_TEMPLATE,
    INSTRUCTION,
    PromptTemplate,
    read_records,
    read_template,
    read_texts,
    template_record,
    trained_template,
    valid_unicode,
)

RECORDS = [
    {"instruction": "Summarize.", "input": "The river rose, “slowly”.", "output": "It rose."},
    {"instruction": "Shorten.", "input": "Two ships left.\n\nThey carried grain.", "output": "Ships left.", "id": 7},
]
TEXTS = ["One text.", {"text": "Another.\nOf two lines."}, {"article": "A third", "source": "é"}]
ROWS = [{"article": record["input"], "summary": record["output"], "id": 3.5} for record in RECORDS]
TEMPLATE = {"head": "Task: {instruction}\nText: ", "tail": "\nAnswer:"}
HUGE_NUMBER, DEEP = b'[{"input": ' + b"7" * 5000 + b"}]", b"[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@fuzz
@given(json_files(RECORDS))
@example(HUGE_NUMBER)
@example(DEEP)
@example(json.dumps([{**RECORDS[0], "output": "half a pair \ud800"}]).encode())
def test_records(folder, content):
    path = written(folder / "records.json", content)
    found = attempt(lambda: read_records(path), path)
    if found is not REFUSED:
        cleaned = [{k: valid_unicode(v) if isinstance(v, str) else v for k, v in r.items()} for r in parsed(content)]
        assert repr(found) == repr(cleaned)
        assert all(isinstance(record[key], str) for record in found for key in ("instruction", "input", "output"))
        assert found and all(record["output"].strip() for record in found)
    assert path.read_bytes() == content


@fuzz
@given(jsonl_files(RECORDS))
@example(HUGE_NUMBER)
def test_records_by_line(folder, content):
    path = written(folder / "records.jsonl", content)
    found = attempt(lambda: read_records(path), path)
    if found is not REFUSED:
        assert len(found) == len(parsed_lines(content)) and all(record["output"].strip() for record in found)


@fuzz
@given(st.sampled_from([".json", ".JSON", ".jsonl"]), st.data())
def test_texts(folder, suffix, data):
    content = data.draw(jsonl_files(TEXTS) if suffix == ".jsonl" else json_files(TEXTS))
    path = written(folder / f"texts{suffix}", content)
    for read in (lambda: read_texts(path), lambda: read_source(Source(str(path)), None, None)):
        found = attempt(read, path)
        if found is not REFUSED:
            items = parsed_lines(content) if suffix == ".jsonl" else parsed(content)
            names = ("text", "input", "article", "document", "content")
            texts = [
                item if isinstance(item, str) else next(item[n] for n in names if isinstance(item.get(n), str))
                for item in items
            ]
            assert found == [valid_unicode(text) for text in texts if text.strip()]


def test_texts_in_capitals_are_no_plain_text(folder):
    path = written(folder / "capitals.JSON", json.dumps(TEXTS).encode())
    assert read_source(Source(str(path)), None, None) == ["One text.", "Another.\nOf two lines.", "A third"]


@fuzz
@given(st.one_of(damaged("“Plain” text.\r\nTwo lines.".encode()), st.binary(max_size=60), st.text().map(str.encode)))
def test_plain_text(folder, content):
    path = written(folder / "plain.txt", content)
    found = attempt(lambda: read_texts(path), path)
    if found is not REFUSED:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert found == [text] and text.strip()


def table(rows: list[dict]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


cells = st.text(st.sampled_from("ab \",;\n\r\t'\x00é\u2028"), max_size=12)


@fuzz
@given(st.lists(st.fixed_dictionaries({"article": cells, "summary": cells, "note": cells}), min_size=1, max_size=4))
def test_tables_come_back_as_they_were_written(folder, rows):
    path = written(folder / "table.csv", table(rows))
    found = attempt(lambda: list(file_triples([path], None, None, "Do.")), path)
    if found is REFUSED:
        assert any("\0" in cell for row in rows for cell in row.values())
    else:
        assert found == [(row["article"], row["summary"], "Do.") for row in rows]


@fuzz
@given(st.one_of(damaged(table(ROWS)), st.binary(max_size=60)))
@example(b'article,"two\nlines"\n1,2\n')
def test_damaged_tables(folder, content):
    path = written(folder / "table.csv", content)
    found = attempt(lambda: list(file_triples([path], None, None, None)), path)
    assert found is REFUSED or all(isinstance(text, str) for triple in found for text in triple)


@fuzz
@given(st.sampled_from([".json", ".jsonl"]), st.data())
def test_rows_of_any_json(folder, suffix, data):
    content = data.draw(jsonl_files(ROWS) if suffix == ".jsonl" else json_files({"data": ROWS}))
    path = written(folder / f"rows{suffix}", content)
    found = attempt(lambda: list(file_triples([path], None, None, None)), path)
    assert found is REFUSED or all(isinstance(text, str) for triple in found for text in triple)


@pytest.fixture(scope="module")
def parquet(folder) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {"article": ["One.", "Two.", None], "summary": ["1", "2", "3"], "day": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


@fuzz
@given(st.data())
def test_damaged_parquet(folder, parquet, data):
    path = written(folder / "rows.parquet", data.draw(damaged(parquet)))
    found = attempt(lambda: list(file_triples([path], None, None, None)), path)
    assert found is REFUSED or all(isinstance(text, str) for triple in found for text in triple)


@pytest.mark.parametrize("kind", ["timestamp", "date"])
def test_parquet_with_a_day_that_no_calendar_has(folder, kind):
    import pyarrow
    import pyarrow.parquet

    days = {
        "timestamp": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "date": pyarrow.array([2**30], pyarrow.date32()),
    }
    path = folder / f"{kind}.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"article": ["One."], "summary": ["1"], "day": days[kind]}), path)
    attempt(lambda: list(file_triples([path], None, None, None)), path)


# Opened by the library `datasets`, some thirty times as slow as the readers above.
@settings(fuzz, max_examples=40)
@given(st.sampled_from(["csv", "parquet", "arrow"]), st.data())
def test_sources_that_another_library_opens(folder, parquet, kind, data):
    whole = {"csv": table([{"text": "One."}, {"text": "Two."}]), "parquet": parquet, "arrow": parquet}[kind]
    path = written(folder / f"source.{kind}", data.draw(damaged(whole)))
    found = attempt(lambda: read_source(Source(str(path)), None, None), path)
    assert found is REFUSED or (found and all(isinstance(text, str) for text in found))


# --------------------------------------------------------------------------------------------------------- templates


@fuzz
@given(json_files(TEMPLATE))
@example(b'{"head": "{instruction} \\ud800", "tail": ""}')
@example(b'{"head": "{instruction}", "tail": "", "two\\nlines": ""}')
def test_templates(folder, tokenizer, content):
    path = written(folder / "template.json", content)
    found = attempt(lambda: read_template(path), path)
    if found is not REFUSED:
        value = parsed(content)
        assert (found.head, found.tail) == (valid_unicode(value["head"]), valid_unicode(value["tail"]))
        assert INSTRUCTION in found.head and tokenizer(found.prompt("Do.", "Text"))["input_ids"]


@fuzz
@given(st.text(), st.text(), st.text(), st.text())
def test_prompt_is_the_text_around_instruction_and_article(before, after, instruction, article):
    template = PromptTemplate(f"{before}{INSTRUCTION}", after)
    assert template.prompt(instruction, article) == f"{before}{instruction}{article}{after}"


@fuzz
@given(json_files({"prompt": template_record(PromptTemplate(TEMPLATE["head"], TEMPLATE["tail"])), "seed": 0}))
def test_template_in_a_run_record(folder, content):
    path = written(folder / "run.json", content)
    found = attempt(lambda: trained_template(folder / "state.pth"), path)
    if found is not REFUSED and found != DEFAULT_TEMPLATE:
        assert template_record(found) == parsed(content)["prompt"]
        assert isinstance(found.head, str) and isinstance(found.tail, str) and isinstance(found.special_tokens, bool)
