"""Files that are written whole or not at all, temporary folders, output folders held by one run, and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from sparsity.errors import UserError

PIECE_BYTES = 1 << 16
TEMPORARY = ".tmp"  # suffix of files that are being written
LOCK_PATIENCE = 3.0  # seconds: a killed run keeps its locks until the last of its threads has ended

_held_locks = contextlib.ExitStack()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without error.

    Temporary files that killed processes left for the same `path` are removed first; those of live ones stay.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    temporary, handle = _locked_temporary(path.parent, f".{path.name}.", is_folder=False)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would lock colleagues out of the result
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def scratch_folder(parent: str | Path | None = None, prefix: str = ".scratch.") -> Iterator[Path]:
    """Yield a new folder in `parent`, which is removed with all its content when the block ends.

    Folders of the same prefix that killed processes left in `parent` are removed first; those of live ones stay.

    Args:
        parent: by default the system's folder for temporary files.
    """
    parent = Path(parent or tempfile.gettempdir())
    remove_scratch_folders(parent, prefix)
    folder, handle = _locked_temporary(parent, prefix, is_folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def held_folder(path: Path, target: str | Path) -> Iterator[Path]:
    """Yield the new, empty folder `path` for this run alone; it is removed when the block ends, unless it was renamed.

    Args:
        path: what a killed run left there is removed first.
        target: what the folder is for, in messages.

    Raises:
        UserError: another run holds the folder.
    """
    while True:
        path.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its last holder has just removed it
            continue
        held = lock_file(handle) is False
        if not held and _is_open_as(path, handle):
            break
        os.close(handle)
        if held:
            raise _held_by_another(target)
    try:
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield path
    finally:
        if _is_open_as(path, handle):
            shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of `atomic_path` whose writers are dead.

    Args:
        name: only those of the file of this name; None: of all files in the folder.
    """
    _remove_unlocked(folder, r"\..+\." if name is None else re.escape(f".{name}."))


def remove_scratch_folders(parent: Path, prefix: str) -> None:
    """Remove folders of `scratch_folder` whose makers are dead."""
    _remove_unlocked(parent, re.escape(prefix))


def _locked_temporary(parent: Path, prefix: str, is_folder: bool) -> tuple[Path, int]:
    """A new temporary file or folder, with an open handle whose lock shows other processes that this one is alive.

    Until it is locked, another process that cleans up may take it for a leftover and remove it: then another is made.
    """
    while True:
        if is_folder:
            path = Path(tempfile.mkdtemp(prefix=prefix, suffix=TEMPORARY, dir=parent))
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=TEMPORARY, dir=parent)
            path = Path(name)
        if lock_file(handle) is not False and _is_open_as(path, handle):
            return path, handle
        os.close(handle)


def _is_open_as(path: Path, handle: int) -> bool:
    """Whether `path` still is the file or folder that `handle` was opened from."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_unlocked(folder: Path, prefix: str) -> None:
    """Remove temporary files and folders of names that begin with the pattern `prefix` which no process has locked."""
    for leftover in folder.iterdir():
        if not re.fullmatch(rf"{prefix}[a-z0-9_]{{8}}{re.escape(TEMPORARY)}", leftover.name):
            continue
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            handle = os.open(leftover, os.O_RDONLY if leftover.is_dir() else os.O_RDWR)
            try:
                if lock_file(handle):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


def lock_file(handle: int) -> bool | None:
    """Take an exclusive lock on an open file or folder until its handle is closed or the process dies.

    Returns:
        True if it was taken, False if another process holds it, None if the file system has no locks.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def save_json(value: Any, path: str | Path) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_torch(value: Any, path: str | Path) -> None:
    """`torch.save`, whole or not at all."""
    import torch

    with atomic_path(path) as temporary:
        torch.save(value, temporary)


def prepare_output_dir(path: str | Path) -> Path:
    """Create the folder and check that files can be written in it.

    Raises:
        UserError: the path is a file, or cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # without a name, where the system can: a kill leaves nothing
            pass
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {error.strerror}; choose another one") from error
    return path


def lock_output_dir(path: str | Path) -> None:
    """Reserve an existing folder for this run, until `release_locks` is called or the process dies.

    What killed runs left half written in it is then removed. In a multi-process run only the main process should call
    this. On a file system without locks, as some network file systems are, the folder is not reserved; a warning says
    so.

    Raises:
        UserError: another run holds it.
    """
    handle = hold_until_exit(Path(path) / ".lock", path)
    if handle is None:
        return
    remove_leftovers(Path(path))
    with contextlib.suppress(OSError):  # the number only serves a message; a full disk is reported elsewhere
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())


def hold_until_exit(lock: Path, target: str | Path) -> BinaryIO | None:
    """Lock the file `lock`, made if missing, until `release_locks` is called or the process dies.

    If it is empty then, `release_locks` removes it. A lock that another process holds is waited for, for
    `LOCK_PATIENCE` seconds, so that a run can be started anew as soon as it was killed.

    Args:
        target: what this run alone may write, for messages.

    Returns:
        the open file; None, after a warning, on a file system without locks.

    Raises:
        UserError: another process holds it.
    """
    limit = time.monotonic() + LOCK_PATIENCE
    while True:
        handle = open(lock, "ab+", buffering=0)  # noqa: SIM115
        taken = lock_file(handle.fileno())
        if taken is False:
            if time.monotonic() > limit:
                break
            time.sleep(0.05)
        elif _is_open_as(lock, handle.fileno()):
            break
        handle.close()  # held by another, or its last holder has just removed it
    if taken is False:
        handle.seek(0)
        pid = handle.read(20).decode(errors="replace").strip()
        handle.close()
        raise _held_by_another(target, f" (process {pid})" if pid.isdigit() else "")
    _held_locks.enter_context(handle)
    _held_locks.callback(_remove_if_empty, lock)
    if taken is None:
        note = f"warning: the file system of {target} has no locks; start no second run that writes there"
        print(note, file=sys.stderr, flush=True)
        return None
    return handle


def _held_by_another(target: str | Path, owner: str = "") -> UserError:
    return UserError(f"another run{owner} is writing to {target}; wait for it, or choose another folder")


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def release_locks() -> None:
    """Release everything that `hold_until_exit` and `lock_output_dir` reserved for this process."""
    _held_locks.close()


def path_exists(path: str | Path) -> bool:
    """Whether there is a file or folder of this name; also for what can be no name, such as an empty one."""
    try:
        return bool(str(path)) and Path(path).exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is a file of this name; also for what can be no name."""
    return path_exists(path) and Path(path).is_file()


def require_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file.

    Raises:
        UserError: it is not; the message names `what` the file should have been.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{what} not found: {path}")
    return path


def file_digest(path: str | Path, samples: int | None = None) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Args:
        samples: hash only the file's size and this many 64 KiB pieces spread over it, which a change of weights or
            data can hardly miss; for files of many gigabytes.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(b"" if samples is None else str(size).encode())
    with open(path, "rb") as stream:
        if samples is None:
            while part := stream.read(1 << 22):
                digest.update(part)
        for number in range(samples or 0):
            stream.seek(number * max(0, size - PIECE_BYTES) // max(1, (samples or 0) - 1))
            digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- seal

SEAL = "complete.json"  # {file name: SHA-256 of its content}


def seal(folder: Path, *names: str) -> None:
    """Record in `folder` the SHA-256 of each file, as the last step of writing it.

    Args:
        names: paths of the files within `folder`, added to those that are already sealed; by default all files.
    """
    previous = read_seal(folder) if names else {}
    files = names or [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    save_json(previous | {name: file_digest(folder / name) for name in files if name != SEAL}, folder / SEAL)


def read_seal(folder: Path) -> dict[str, str]:
    """SHA-256 of each sealed file in `folder`, by its path there; empty without a readable seal."""
    try:
        value = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON):
        return {}
    return value if isinstance(value, dict) else {}


def is_sealed(folder: Path, *names: str) -> bool:
    """Whether the files, by default all sealed ones of the folder, are as they were when they were sealed."""
    digests = read_seal(folder)
    return bool(digests) and all(
        is_file(folder / name) and file_digest(folder / name) == digests.get(name) for name in names or digests
    )


# -------------------------------------------------------------------------------------------------------------- JSON

NOT_JSON = (ValueError, RecursionError)  # what json.loads raises: also for numbers of thousands of digits, deep nesting


def is_whole_number(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is an integer; `true` and `false`, which Python counts among them, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float can hold: JSON's integers have no limit. NaN and infinity are."""
    return isinstance(value, float) or (is_whole_number(value) and abs(value) <= sys.float_info.max)


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file, or one value per line if it is named .jsonl.

    Raises:
        UserError: the file is missing or malformed; the message calls it `what`.
    """
    path = require_file(path, what)
    if path.suffix.lower() == ".jsonl":
        return list(read_jsonl(path, what))
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except NOT_JSON as error:
        raise UserError(f"{what} {path} is not valid JSON: {error}") from error


def read_jsonl(path: str | Path, what: str, skip_damaged: bool = False) -> Iterator[Any]:
    """Yield the values of a file with one JSON value per line.

    Args:
        skip_damaged: pass over lines that are not JSON in UTF-8, such as one that a killed process left half written.

    Raises:
        UserError: a line is malformed (unless `skip_damaged`); the message calls the file `what`.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape" if skip_damaged else "strict") as stream:
            for line in stream:
                number += 1
                if not line.strip():
                    continue
                try:
                    line.encode()  # fails where the file is not UTF-8
                    value = json.loads(line)
                except NOT_JSON:
                    if skip_damaged:
                        continue
                    raise
                yield value
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except NOT_JSON as error:
        raise UserError(f"{what} {path} line {number} is not valid JSON: {error}") from error


def json_lines(values: Iterable[Any]) -> Iterator[str]:
    """Each value as one line of JSON, line break included."""
    for value in values:
        yield json.dumps(value, ensure_ascii=False) + "\n"


def save_jsonl(values: Iterable[Any], path: str | Path) -> None:
    """Write one JSON value per line, the whole file or nothing."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json_lines(values))


def append_jsonl(values: Iterable[Any], path: str | Path) -> None:
    """Append one JSON value per line; they are on disk when this returns."""
    text = "".join(json_lines(values)).encode()
    with open(path, "ab+") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # half a line of a killed process, which must not be joined to ours
                text = b"\n" + text
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


# ------------------------------------------------------------------------------------------------------- safetensors


def safetensors_files(path: Path) -> list[Path]:
    """The shards of a model folder, all of those its index names; or the single file `path`.

    Raises:
        UserError: there are none, the index is malformed, or a shard is missing.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"no .safetensors files in {path}; export a model there with export_hf.py")
        return files
    content = read_json(index, "weight index")
    try:
        names = sorted(set(content["weight_map"].values()))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"weight index {index} has no weight_map") from error
    if not names:
        raise UserError(f"weight index {index} names no shards")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"weight index {index} names the shard {name!r}, which is no file of its folder")
        if not is_file(path / name):
            raise UserError(f"{path} lacks the shard {name} that its index names; copy or export the model again")
    return [path / name for name in names]
