"""Files written whole or not at all, output folders held by one run, digests, and JSON lines."""

from __future__ import annotations

import errno
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


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), files.atomic_folder(target) as folder:
        raise ZeroDivisionError
    assert os.listdir(target) == ["a"]
    with files.atomic_folder(target) as folder:
        (folder / "b").write_text("2")
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["out"]


def test_folder_that_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").write_text("")
    (tmp_path / ".out.old").mkdir()  # killed between two renames: the earlier result gets its name back
    (tmp_path / ".out.old" / "earlier").write_text("")
    with files.atomic_folder(tmp_path / "out") as folder:
        assert os.listdir(folder) == [] and os.listdir(tmp_path / "out") == ["earlier"]
        (folder / "new").write_text("")
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]


def test_two_runs_do_not_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    with files.atomic_folder(tmp_path / "out"):
        with pytest.raises(UserError, match="another run is writing"), files.atomic_folder(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.unfinished").is_dir()


def test_output_folder_is_held_until_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    files.lock_output_dir(tmp_path)
    with pytest.raises(UserError, match="another run is writing to"):
        files.lock_output_dir(tmp_path)
    files.release_locks()  # as run_cli does at the end of a process
    files.lock_output_dir(tmp_path)
    files.release_locks()


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    files.lock_output_dir(tmp_path)
    files.release_locks()
    assert "has no locks" in capsys.readouterr().err


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


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    (tmp_path / "cache").mkdir()
    ours, other = (tmp_path / f".{name}.json.abcdefgh.tmp" for name in ("a [b]", "b"))
    inner = tmp_path / "cache" / ".c.json.abcdefgh.tmp"
    for path in (ours, other, inner, tmp_path / ".notes.tmp"):
        path.write_text("half")
    files.lock_output_dir(tmp_path, "a [b].json")  # other runs may write other files
    assert not ours.exists() and other.exists()
    files.lock_output_dir(tmp_path)  # no other run can be writing here
    files.release_locks()
    assert sorted(os.listdir(tmp_path)) == [".a [b].json.lock", ".lock", ".notes.tmp", "cache"]
    assert not inner.exists()


def test_scratch_folder_is_removed_and_old_ones_too(tmp_path):
    old = tmp_path / ".scratch.abcdefgh.tmp"
    old.mkdir()
    os.utime(old, (0, 0))
    with files.scratch_folder(tmp_path) as folder:
        (folder / "a").write_text("")
        assert os.listdir(tmp_path) == [folder.name]
    assert not os.listdir(tmp_path)


def test_seal_finds_a_flipped_bit_and_a_missing_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"content")
    assert not files.is_sealed(tmp_path)
    files.seal(tmp_path)
    assert files.is_sealed(tmp_path) and files.is_sealed(tmp_path, "a")
    (tmp_path / "b").write_bytes(b"bontent")
    assert files.is_sealed(tmp_path, "a") and not files.is_sealed(tmp_path)
    files.seal(tmp_path, "b")
    assert files.is_sealed(tmp_path)
    (tmp_path / "a").unlink()
    assert not files.is_sealed(tmp_path)
    (tmp_path / files.SEAL).write_text('{"a')
    assert not files.is_sealed(tmp_path)
