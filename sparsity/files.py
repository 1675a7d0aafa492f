"""Files that are written whole or not at all, folders that one run holds, seals, and JSON."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from sparsity.errors import UserError, reported_as, warn

TEMPORARY = ".tmp"  # suffix of files and folders that are being written
LOCK = ".lock"
LOCK_PATIENCE = 3.0  # seconds; a killed run keeps its lock until the last of its threads has ended
DAY = 24 * 60 * 60.0  # seconds

_held_locks = contextlib.ExitStack()

# ----------------------------------------------------------------------------------------------------- whole or not


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _finish_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes target's place only if the block ends without error.

    Its name is fixed: the next run cleans up after one that was killed, also between the two renames at the end.

    Raises:
        UserError: another run is writing `target`.
    """
    parent = prepare_output_dir(target.parent)
    new, old = parent / f".{target.name}.unfinished", parent / f".{target.name}.old"
    lock = parent / f".{target.name}{LOCK}"
    with _acquire(lock, target):
        if old.exists() and not target.exists():
            os.replace(old, target)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            for path in new.iterdir():
                _finish_file(path)
            if target.exists():
                os.replace(target, old)
            os.replace(new, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _finish_file(path: Path) -> None:
    """Put a file on disk with ordinary permissions: mkstemp and safetensors make files that only their owner reads."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, removed when the block ends, and remove those that killed runs left a day ago."""
    _remove_leftovers(parent, ".scratch", DAY)
    with tempfile.TemporaryDirectory(TEMPORARY, ".scratch.", parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _remove_leftovers(folder: Path, pattern: str, age: float) -> None:
    """Remove temporary files and folders that were last written `age` seconds ago or earlier."""
    for path in list(folder.glob(f"{pattern}.????????{TEMPORARY}")):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if time.time() - path.stat().st_mtime >= age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_json(value: Any, path: str | Path) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------- folders of one run


def prepare_output_dir(path: str | Path) -> Path:
    """Create the folder and check that files can be written in it.

    Raises:
        UserError: the path is a file, or cannot be created or written.
    """
    path = Path(path)
    with reported_as(f"cannot write to the output folder {path}; choose another one", OSError):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


def lock_output_dir(path: str | Path, file: str | None = None) -> None:
    """Reserve an existing folder for this run until `release_locks` or the end of the process.

    Removes temporary files that killed runs left in it. Of several processes only the main one should call this.

    Args:
        file: reserve only the file of this name; other runs may write others into the folder.

    Raises:
        UserError: another run holds the folder or file.
    """
    path = Path(path)
    target = path / file if file else path
    _held_locks.enter_context(_acquire(path / (f".{file}{LOCK}" if file else LOCK), target))
    _remove_leftovers(path, f".{glob.escape(file)}" if file else "**/.*", age=0)


def release_locks() -> None:
    """Release everything that this process holds."""
    _held_locks.close()


def _acquire(path: Path, target: str | Path) -> BinaryIO:
    """Open and lock the file `path`; closing it releases the lock. On a file system without locks only warn."""
    import fcntl

    handle = open(path, "ab")  # noqa: SIM115
    limit = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > limit:
                handle.close()
                message = f"another run is writing to {target}; wait for it, or choose another folder"
                raise UserError(message) from None
            time.sleep(0.05)
        except OSError:
            warn(f"the file system of {target} has no locks; start no second run that writes there")
            return handle


# -------------------------------------------------------------------------------------------------------------- paths


def path_exists(path: str | Path) -> bool:
    """Whether the path exists; False for invalid paths: empty, too long, or with a null byte."""
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises OSError for a name that is too long


def is_file(path: str | Path) -> bool:
    """Whether the path is a file; False for invalid paths."""
    return os.path.isfile(path)  # noqa: PTH113


def require_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file, else raise a UserError that calls it `what`."""
    if not is_file(path):
        raise UserError(f"{what} not found: {path}")
    return Path(path)


# --------------------------------------------------------------------------------------------------- digests and seal


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


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
    digests = None
    with contextlib.suppress(OSError, UserError):
        digests = read_json(folder / SEAL, "seal")
    return digests if isinstance(digests, dict) else {}


def is_sealed(folder: Path, *names: str) -> bool:
    """Whether the files, by default all sealed ones of the folder, are as they were when they were sealed."""
    digests = read_seal(folder)
    return bool(digests) and all(
        is_file(folder / name) and file_digest(folder / name) == digests.get(name) for name in names or digests
    )


# -------------------------------------------------------------------------------------------------------------- JSON


def is_whole_number(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is an integer and not a bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file, or one value per line if it is named .jsonl.

    Raises:
        UserError: the file is missing or malformed; the message calls it `what`.
    """
    path = require_file(path, what)
    if path.suffix.lower() == ".jsonl":
        return list(read_jsonl(path, what))
    return _parse_json(path.read_bytes(), f"{what} {path}")


def _parse_json(content: bytes, where: str) -> Any:
    # Also for numbers of thousands of digits, and deep nesting.
    with reported_as(f"{where} is not valid JSON in UTF-8", ValueError, RecursionError):
        return json.loads(content.decode("utf-8-sig"))


def read_jsonl(path: str | Path, what: str, skip_damaged: bool = False) -> Iterator[Any]:
    """Yield the values of a file with one JSON value per line.

    Args:
        skip_damaged: skip lines that are not JSON in UTF-8, such as one that a killed process left half written.

    Raises:
        UserError: a line is malformed (unless `skip_damaged`); the message calls the file `what`.
    """
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                with contextlib.suppress(UserError) if skip_damaged else contextlib.nullcontext():
                    yield _parse_json(line, f"{what} {path} line {number}")


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


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        UserError: it is damaged; names the file.
    """
    from safetensors import SafetensorError, safe_open

    damaged = reported_as(f"{file} is damaged or truncated; copy it again", SafetensorError, OSError)
    with damaged, safe_open(file, framework="pt") as tensors:
        yield tensors


def safetensors_files(path: Path) -> list[Path]:
    """The shards of a model folder, as its index lists them; or the single file `path`.

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
    with reported_as(f"weight index {index} has no weight_map", LookupError, TypeError, AttributeError):
        files = [path / Path(name).name for name in sorted(set(content["weight_map"].values()))]
    if missing := [file for file in files if not is_file(file)]:
        raise UserError(f"weight index {index} names {missing[0].name}, which is missing; copy the model again")
    return files
