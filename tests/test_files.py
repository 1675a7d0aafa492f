"""Files written whole or not at all, output folders held by one run, digests, and JSON lines."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from sparsity import files
from sparsity.errors import UserError


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(target) as temporary:
        temporary.write_text("half of the new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    with files.atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_saved_file_has_ordinary_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        files.save_json({"a": "é"}, tmp_path / "a.json")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}


def test_prepare_output_dir(tmp_path):
    assert files.prepare_output_dir(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        files.prepare_output_dir(tmp_path / "file")


@pytest.mark.parametrize("kind", ["file", "scratch folder", "held folder"])
@pytest.mark.parametrize("when", ["open", "lock_file"])  # just before the file or folder is opened, or locked
def test_what_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch, kind, when):
    home = files.os if when == "open" else files
    real, removed = getattr(home, when), []

    def remove_first(*args, **kwargs):
        for entry in tmp_path.iterdir() if not removed else ():
            removed.append(entry)
            entry.rmdir() if entry.is_dir() else entry.unlink()
        return real(*args, **kwargs)

    monkeypatch.setattr(home, when, remove_first)
    if kind == "file":
        files.save_json([1], tmp_path / "file")
        assert json.loads((tmp_path / "file").read_text()) == [1]
    else:
        name = tmp_path / "held"
        made = files.scratch_folder(tmp_path) if kind == "scratch folder" else files.held_folder(name, name)
        with made as folder:
            (folder / "file").write_text("inside")
    assert bool(removed) == (kind != "file" or when == "lock_file")  # a file is made open


def test_output_folder_is_held_until_the_run_ends(tmp_path):
    def second():
        files.lock_output_dir(tmp_path)

    def first():
        files.lock_output_dir(tmp_path)
        with pytest.raises(UserError, match=f"another run .process {os.getpid()}. is writing"):
            second()

    first()
    files.release_locks()  # as run_cli does at the end of a process
    second()
    files.release_locks()


HOLDER = """
import sys, time
from sparsity.files import lock_output_dir
lock_output_dir(sys.argv[1])
print("held", flush=True)
time.sleep(1)
"""


def test_run_that_is_just_ending_is_waited_for(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    try:
        files.lock_output_dir(tmp_path)
    finally:
        files.release_locks()
        holder.communicate()


def test_digest_follows_the_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 2000)
    whole, sampled = files.file_digest(path), files.file_digest(path, 64)
    assert (files.file_digest(path), files.file_digest(path, 64)) == (whole, sampled)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert files.file_digest(path) != whole and files.file_digest(path, 64) != sampled
    path.write_bytes(path.read_bytes() + b"\0")
    assert files.file_digest(path, 64) not in (sampled, whole)


def test_lines_survive_a_kill_within_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_jsonl([{"a": 1}, {"a": "é"}], path)
    path.write_bytes(path.read_bytes() + b'{"a": 3, "b')  # what a kill within a write leaves
    files.append_jsonl([{"a": 4}], path)
    assert list(files.read_jsonl(path, "log", skip_damaged=True)) == [{"a": 1}, {"a": "é"}, {"a": 4}]
    with pytest.raises(UserError, match="log .*a.jsonl line 3 is not valid JSON"):
        list(files.read_jsonl(path, "log"))


def test_saved_lines_replace_the_file_only_once_all_are_there(tmp_path):
    path = tmp_path / "a.jsonl"
    files.save_jsonl([1, [2]], path)

    def breaks():
        yield 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.save_jsonl(breaks(), path)
    assert list(files.read_jsonl(path, "lines")) == [1, [2]]
    assert os.listdir(tmp_path) == ["a.jsonl"]


WRITER = """
import sys, time
from sparsity.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is about to write tmp_path / 'a [b].json'."""
    target = tmp_path / "a [b].json"
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process, target
        process.kill()


def test_half_written_files_of_killed_processes_are_removed(writer):
    process, target = writer
    process.kill()
    process.wait()
    assert len(os.listdir(target.parent)) == 1
    files.save_json("whole", target)
    assert os.listdir(target.parent) == [target.name]


def test_a_new_run_in_the_folder_removes_them_as_well(writer):
    process, target = writer
    process.kill()
    process.wait()
    (target.parent / ".notes.tmp").write_text("not ours")
    files.lock_output_dir(target.parent)
    files.release_locks()
    assert sorted(os.listdir(target.parent)) == [".lock", ".notes.tmp"]


def test_what_a_live_process_writes_stays(writer):
    _, target = writer
    files.save_json("whole", target)
    files.lock_output_dir(target.parent)
    files.release_locks()
    assert len([name for name in os.listdir(target.parent) if name.endswith(".tmp")]) == 1


def test_appended_lines_start_on_their_own_line(tmp_path):
    log = tmp_path / "log.jsonl"
    files.append_jsonl([{"step": 1}], log)
    files.append_jsonl([{"step": 2}], log)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    log.write_text('{"step": 1}\n{"st')
    files.append_jsonl([{"step": 2}], log)
    assert list(files.read_jsonl(log, "log", skip_damaged=True)) == [{"step": 1}, {"step": 2}]
