"""What the scripts share: one way to parse options, to end on an error, and the groups of options that several have.

Scripts import from here and from the package sparsity; no script imports another script.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sparsity.devices import INFERENCE_DTYPES
from sparsity.errors import UserError, first_line, memory_shortage
from sparsity.files import release_locks

if TYPE_CHECKING:
    from transformers import HfArgumentParser

FAILED_WRITES = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG)

# ------------------------------------------------------------------------------------------------------------ options


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and ends the help of every option that has a default with it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _ClearErrors(argparse.ArgumentParser):
    """Ends on a wrong option with one clear line; of several processes only the first prints it."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            self.exit(2)
        if message.startswith("unrecognized arguments: "):
            known = [name for action in self._actions for name in action.option_strings]
            wrong = [word.partition("=")[0] for word in message.split()[2:] if word.startswith("--")]
            hints = [hint for word in wrong for hint in difflib.get_close_matches(word, known, 1)]
            message += f"; did you mean {' '.join(hints)}?" if hints else ""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


class Parser(_ClearErrors):
    """The argument parser of every script: the same help, the same errors, no abbreviated options."""

    def __init__(self, description: str | None, **options: Any):
        # An abbreviation could make a mistyped option pass for another one.
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)


def dataclass_parser(types: Sequence[type], description: str | None, **options: Any) -> HfArgumentParser:
    """Transformers' HfArgumentParser for the dataclasses `types`, with the help and the errors of `Parser`."""
    from transformers import HfArgumentParser

    class DataclassParser(_ClearErrors, HfArgumentParser):
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            # HfArgumentParser would raise a bare ValueError for unknown options, after building the dataclasses.
            known, unknown = super().parse_known_args(args, namespace)
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            return known, unknown

    create: Any = DataclassParser
    return create(list(types), description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)


def add_remote_code_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")


def add_device_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto: CUDA where there is one")


def add_inference_options(group: argparse._ArgumentGroup) -> None:
    """The model to measure: dense or with a state, its precision and its device."""
    group.add_argument("--model_dir", required=True, help="Hugging Face model folder or hub id, dense or exported")
    group.add_argument("--modelopt_restore_path", metavar="STATE", help="sparse state from hf_pts.py or finetune.py")
    group.add_argument(
        "--dtype",
        choices=INFERENCE_DTYPES,
        help="precision of the weights (by default the checkpoint's own); fastest: bf16 where the device computes "
        "faster with it",
    )
    add_device_options(group)
    add_remote_code_option(group)


def add_placement_options(group: argparse._ArgumentGroup) -> None:
    """Ways to evaluate a model that exceeds one GPU; `sparsity.placement` reads them."""
    group.add_argument(
        "--device_map",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
        help="spread the layers over all GPUs of this process, then CPU memory, then disk, as accelerate places them",
    )
    group.add_argument(
        "--max_memory", metavar="DEVICE=SIZE,…", help="most memory for --device_map to fill, e.g. 0=20GiB,cpu=64GiB"
    )
    group.add_argument(
        "--offload_folder", metavar="FOLDER", help="for layers that --device_map puts on disk (by default temporary)"
    )
    group.add_argument(
        *("--tensor_parallel", "--tp"),
        action="store_true",
        help="split every matrix over the processes that torchrun started, which work on the same batch",
    )


def add_template_options(group: argparse._ArgumentGroup) -> None:
    """The prompt around a record's article; finetune.py has the same options in sparsity/sat/arguments.py."""
    group.add_argument(
        "--prompt_template",
        metavar="FILE",
        help='JSON {"head": …, "tail": …}: the prompt before and after the article; {instruction} stands in the head',
    )
    group.add_argument(
        "--chat_template", action="store_true", help="the tokenizer's own chat template, for instruct models"
    )


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Check that options which were given are at least `least`.

    Raises:
        UserError: names the option and its value.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, found {value}")


# ------------------------------------------------------------------------------------------------------------- ending


SMALLER = "free some, or use a machine with more"


def run_cli(main: Callable[[], None], when_memory_ends: str = SMALLER) -> None:
    """Run a script's `main`, turning foreseeable failures into one line on stderr.

    Exit codes: 1 for a wrong input, a full disk or too little memory, 2 for a wrong option, 130 for Ctrl-C. Anything
    else is a defect of ours and keeps its traceback.

    Args:
        when_memory_ends: what the user can do where memory does not suffice; the end of a sentence.
    """
    try:
        main()
    except Exception as error:
        message = _explain(error, when_memory_ends)
        if message is None and not _repeats_another_process(joined=True):
            raise
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they keep alive what fills the memory
        _close_bars()
        if message and not _repeats_another_process():
            print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _close_bars()
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    finally:
        release_locks()


def _explain(error: Exception, when_memory_ends: str) -> str | None:
    """What a user should read of an error; None if it is a defect of ours."""
    if shortage := memory_shortage(error):
        return f"{shortage}; {when_memory_ends}. Files saved before are whole."
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FAILED_WRITES:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}. Free space or choose another output folder."
    if _is_failed_write(error):
        return f"writing failed ({first_line(error)}); is the disk full? Files saved before are whole."
    return None


def _repeats_another_process(joined: bool = False) -> bool:
    """Whether another of several processes reports the failure of the run, which this one repeats or suffers from.

    Args:
        joined: ask only once the processes have joined; before that, it is always the first that reports.
    """
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from sparsity.distributed import is_first_report

        return not is_first_report()
    return not joined and int(os.environ.get("LOCAL_RANK", 0)) > 0


def _close_bars() -> None:
    """End unfinished progress bars, so that a message starts on a line of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()


def _is_failed_write(error: Exception) -> bool:
    """Whether a library's error, of a class of its own, says that a file could not be written."""
    text = str(error)
    if re.search(rf"os error ({'|'.join(map(str, FAILED_WRITES))})\b", text):  # libraries in Rust
        return True
    if type(error).__name__ == "SafetensorError":
        return "I/O error" in text or "IoError" in text  # the second up to safetensors 0.5
    signs = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
