"""What a figure was measured with: the machine, in one line, and the settings."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch


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


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's settings with file names in place of paths, which mean nothing on other machines."""
    values = vars(arguments).items()
    return {key: Path(value).name if isinstance(value, str) and "/" in value else value for key, value in values}
