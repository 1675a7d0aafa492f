"""Command-line helpers of the scripts: parsing options, groups of options that several scripts have, and failing.

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
from sparsity.distributed import have_joined, is_first_report, leave_group_and_exit
from sparsity.errors import UserError, first_line, memory_shortage
from sparsity.files import release_locks

if TYPE_CHECKING:
    from transformers import HfArgumentParser

FAILED_WRITES = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG)

# ------------------------------------------------------------------------------------------------------------ options


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and appends each option's default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _ClearErrors(argparse.ArgumentParser):
    """Reports a wrong option in one line, on the first process only, and exits."""

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
    """The argument parser of every script. Options cannot be abbreviated: a mistyped one could pass for another."""

    def __init__(self, description: str | None, **options: Any):
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


def add_model_option(group: argparse._ArgumentGroup, help: str, required: bool = True) -> None:
    """The dense model, as `args.model_dir`, under both names that scripts of NVIDIA's example have for it."""
    group.add_argument(*("--model_dir", "--model_name_or_path"), required=required, help=help)


def add_inference_options(group: argparse._ArgumentGroup) -> None:
    """The model to evaluate, dense or with a sparse state, its precision and device."""
    add_model_option(group, "Hugging Face model folder or hub id, dense or exported")
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


def parse_pairs(option: str, pairs: Sequence[str]) -> list[tuple[str, str]]:
    """The (name, value) pairs of an option that takes NAME=VALUE, or raise a UserError that names the wrong one.

    >>> parse_pairs("--run", ["dense=eval/dense"])
    [('dense', 'eval/dense')]
    """
    split = [(name, value) for name, _, value in (pair.partition("=") for pair in pairs)]
    if wrong := [pair for pair, names in zip(pairs, split, strict=True) if not all(names)]:
        raise UserError(f"{option} takes NAME=VALUE, got '{wrong[0]}'")
    return split


def parse_named(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """`parse_pairs` for an option that takes each name once."""
    named = parse_pairs(option, pairs)
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option} got the name '{twice[0]}' twice")
    return dict(named)


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise a UserError if one of these options is given and less than `least`."""
    for name in names:
        value = vars(args)[name]
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")


# ------------------------------------------------------------------------------------------------------------- failing


def run_cli(main: Callable[[], None], memory_advice: str = "free some, or use a machine with more") -> None:
    """Run a script's `main` and report foreseeable failures in one line on stderr.

    Exit codes: 1 for a wrong input, a full disk or too little memory, 2 for a wrong option, 130 for Ctrl-C. Any other
    error is a defect of ours and keeps its traceback. One of several processes exits as soon as it fails, and the
    launcher stops the others; only the first one reports.

    Args:
        memory_advice: what the user can do when memory runs out; ends a sentence.
    """
    try:
        main()
    except Exception as error:
        message = _explain(error, memory_advice)
        is_first = is_first_report()
        if message is None and (is_first or not have_joined()):
            raise
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they reference the tensors that fill memory
        _close_bars()
        if message and is_first:
            print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _close_bars()
        print("interrupted; the same command resumes, finetune.py with --resume", file=sys.stderr)
        sys.exit(130)
    finally:
        release_locks()
    leave_group_and_exit()


def _explain(error: Exception, memory_advice: str) -> str | None:
    """One line about an error for the user; None if it is a defect of ours."""
    if shortage := memory_shortage(error):
        if "RANK" in os.environ:
            shortage += f" in process {os.environ['RANK']}; start fewer processes"
        return f"{shortage}; {memory_advice}. Files saved before are intact."
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("sparsity"):
        return f"the package {error.name} is not installed; install what is missing: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in FAILED_WRITES:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}. Free space or choose another output folder."
    if _is_failed_write(error):
        return f"writing failed ({first_line(error)}); is the disk full? Files saved before are intact."
    return None


def _is_failed_write(error: Exception) -> bool:
    """Whether an error of a library (safetensors and tokenizers in Rust, torch in C++) is a failed write."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and ("I/O error" in text or "IoError" in text):
        return True
    torch_signs = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "iostream error")
    is_torch = isinstance(error, RuntimeError) and any(sign in text for sign in torch_signs)
    return is_torch or bool(re.search(rf"os error ({'|'.join(map(str, FAILED_WRITES))})\b", text))


def _close_bars() -> None:
    """Close unfinished progress bars, so that a message starts on its own line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.close()
