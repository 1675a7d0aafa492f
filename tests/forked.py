"""Run a script as a process of its own, forked from this one: real exit codes, signals and limits, no start-up time."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from conftest import run_as_main

FORK = threading.Lock()  # filelock refuses a fork while another thread is at one


def run_forked(script: str, *arguments, setup: Callable[[], None] = lambda: None) -> subprocess.CompletedProcess:
    """Run the script's command line in a forked child, after `setup` has run there.

    The return code is that of a process: negative for a signal.
    """
    # Pipes, not files: a limit on the size of files must not hit the output.
    (read_out, write_out), (read_err, write_err) = os.pipe(), os.pipe()
    with FORK:
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(write_out, 1)
            os.dup2(write_err, 2)
            for descriptor in (read_out, write_out, read_err, write_err):
                os.close(descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            for handler in logging.getLogger("transformers").handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)  # from before the fork it has pytest's, which is a file
            remove_handlers_of_pytest()
            sys.argv = [script, *map(str, arguments)]
            setup()
            run_as_main(script)
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    os.close(write_out)
    os.close(write_err)
    with ThreadPoolExecutor(2) as pool:
        out, err = pool.map(read_all, (read_out, read_err))
    _, status = os.waitpid(child, 0)
    return subprocess.CompletedProcess([script, *arguments], os.waitstatus_to_exitcode(status), out, err)


def remove_handlers_of_pytest() -> None:
    """Let no logger write what a process of its own would not."""
    for logger in (logging.getLogger(), *logging.getLogger().manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers = [entry for entry in logger.handlers if not type(entry).__module__.startswith("_pytest")]


def read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
        return stream.read()


def dies_replacing(name: str) -> Callable[[], None]:
    """A setup under which the process is killed (as by kill -9) when the new file `name` is about to take its place."""

    def setup() -> None:
        replace = os.replace

        def deadly(source, target, **options):
            if os.path.basename(target) == name:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target, **options)

        os.replace = deadly

    return setup


def small_files(size: int) -> Callable[[], None]:
    """A setup under which no file can grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_locks(code: int) -> Callable[[], None]:
    """A setup under which no file can be locked, as on some network file systems; `code` is the system's errno."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    return lambda: setattr(fcntl, "flock", flock)


def jumping_clock() -> None:
    """A setup under which the system's clock jumps by days, forwards and backwards, each time it is read."""
    import tqdm.std

    real, jumps = time.time, itertools.cycle((0.0, 3e5, -3e5, 1e6, -2e6))
    time.time = lambda: real() + next(jumps)
    tqdm.std.time = time.time  # which has it by a name of its own


def lacks_memory_in(owner: object, name: str, after: int = 0) -> Callable[[], None]:
    """A setup under which the function `owner.name` asks for more memory than there is, once called `after` times."""

    def setup() -> None:
        import torch

        real, calls = getattr(owner, name), itertools.count()

        def greedy(*args, **options):
            if next(calls) >= after:
                torch.empty(2**46)
            return real(*args, **options)

        setattr(owner, name, greedy)

    return setup


def little_memory(extra: int) -> Callable[[], None]:
    """A setup under which the process can grow by `extra` bytes of address space."""

    def setup() -> None:
        with open("/proc/self/statm") as stream:
            size = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))

    return setup
