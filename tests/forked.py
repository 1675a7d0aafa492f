"""Run a script as a process of its own, forked from this one: real exit codes, signals and limits, no start-up time."""

from __future__ import annotations

import contextlib
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
        os.dup2(write_out, 1)
        os.dup2(write_err, 2)
        for descriptor in (read_out, write_out, read_err, write_err):
            os.close(descriptor)
        os._exit(_exit_code(script, arguments, setup))
    os.close(write_out)
    os.close(write_err)
    with ThreadPoolExecutor(2) as pool:
        out, err = pool.map(_read_all, (read_out, read_err))
    _, status = os.waitpid(child, 0)
    return subprocess.CompletedProcess([script, *arguments], os.waitstatus_to_exitcode(status), out, err)


def _exit_code(script: str, arguments: tuple, setup: Callable[[], None]) -> int:
    """Run the script in this process with its output on descriptors 1 and 2."""
    code = 1
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for logger in (logging.getLogger(), *logging.getLogger().manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", [])[:]:
                if type(handler).__module__.startswith("_pytest"):
                    logger.removeHandler(handler)
                elif isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)  # until now it writes where pytest captures
        sys.argv = [script, *map(str, arguments)]
        setup()
        run_as_main(script)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
        return stream.read()


def before_replacing(name: str, action: Callable[[], None]) -> Callable[[], None]:
    """A setup that calls `action` whenever the new file or folder `name` is about to take its place."""

    def setup() -> None:
        replace = os.replace

        def acts(source, target, **options):
            if os.path.basename(target) == name:
                action()
            replace(source, target, **options)

        os.replace = acts

    return setup


def dies_replacing(name: str) -> Callable[[], None]:
    """A setup under which the process is killed (as by kill -9) when `name` is about to take its place."""
    return before_replacing(name, lambda: os.kill(os.getpid(), signal.SIGKILL))


def waits_replacing(name: str, waiting: str, release: str) -> Callable[[], None]:
    """A setup under which the process, before `name` takes its place, creates `waiting` and waits for `release`."""

    def wait() -> None:
        open(waiting, "w").close()
        while not os.path.exists(release):
            time.sleep(0.05)

    return before_replacing(name, wait)


def small_files(size: int) -> Callable[[], None]:
    """A setup under which no file can grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


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
