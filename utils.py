"""What every script of this project shares: one-line errors and files that are written whole.

Scripts import from here and from the engine; no script imports another script.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong, which value, what to do."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_failed_write(error: Exception) -> bool:
    """Whether a library's error, of a class of its own, says that a file could not be written."""
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        return "I/O error" in text or "IoError" in text  # the second up to safetensors 0.5
    signs = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


_held_locks = contextlib.ExitStack()


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`, turning foreseeable failures into one line on stderr.

    Exit codes: 1 for a wrong input or a full disk, 130 for Ctrl-C. Anything else is a defect of ours and
    keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}. Free space or choose another output folder.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not _is_failed_write(error):
            raise
        print(
            f"error: writing failed ({first_line(error)}); is the disk full? Files saved before are whole.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    finally:
        _held_locks.close()


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
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
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {error.strerror}; choose another one") from error
    return path


def lock_output_dir(path: str | Path) -> None:
    """Hold an existing folder for this run alone, until run_cli ends or the process dies, however that happens.

    In a multi-process run only the main process should call this.

    Raises:
        UserError: another run holds it.
    """
    import fcntl

    handle = _held_locks.enter_context(open(Path(path) / ".lock", "ab+", buffering=0))  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = f" (process {pid})" if (pid := handle.read().decode().strip()) else ""
        raise UserError(f"another run{owner} is writing to {path}; wait for it, or choose another folder") from error
    except OSError:
        return  # some network file systems have no locks; then nothing guards the folder
    with contextlib.suppress(OSError):  # the number only serves the message above; a full disk will be told elsewhere
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())


def require_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file, else raise a UserError that names `what` it should have been."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} not found: {path}")
    return path


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file, or one value per line if it is named .jsonl; UserError on anything malformed."""
    path = require_file(path, what)
    if path.suffix.lower() == ".jsonl":
        return list(read_jsonl(path, what))
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON: {error}") from error


def read_jsonl(path: Path, what: str) -> Iterator[Any]:
    """The values of a file with one JSON value per line, one at a time; UserError on anything malformed."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for line in stream:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} line {number} is not valid JSON: {error}") from error
