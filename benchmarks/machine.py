"""What every benchmark reports besides its results: the machine, the settings, and the output file."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sparsity.errors import UserError
from sparsity.files import prepare_output_dir, save_json


def describe_machine(device: torch.device) -> str:
    """E.g. "NVIDIA A100-SXM4-80GB, torch 2.13.0+cu128" or "AMD EPYC 7763, 2 of 2 cores, torch 2.13.0+cpu"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line as JSON values.

    Paths are reduced to their last part: folders mean nothing on another machine.
    """
    return {
        name: Path(value).name if isinstance(value, Path) or (isinstance(value, str) and "/" in value) else value
        for name, value in vars(args).items()
    }


def add_output_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --output, by default benchmarks/results/NAME.json."""
    path = Path(f"benchmarks/results/{name}.json")
    parser.add_argument("--output", type=Path, default=path, metavar="FILE", help="JSON file for the figures")


def check_output(path: Path | None) -> None:
    """Check before measuring that the figures can be saved, and create the folder of `path`.

    Raises:
        UserError: `path` is a folder, or its own folder cannot be created or written.
    """
    if path and path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file name")
    if path:
        prepare_output_dir(path.parent)


def save_figures(figures: dict[str, Any], args: argparse.Namespace, device: torch.device, quiet: bool = False) -> None:
    """Write the figures with the machine and the settings to --output; `quiet` prints nothing."""
    facts = {"machine": describe_machine(device), "torch": torch.__version__, "arguments": settings(args)}
    save_json({**figures, **facts}, args.output)
    if not quiet:
        print(f"figures saved in {args.output}")
