"""Devices: choosing one, the dtypes it is fast with, and memory.

torch is imported inside the functions, so that scripts can show DTYPES in `--help` without loading it.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsity.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # values of --dtype and torch's names for them
FASTEST = "fastest"
INFERENCE_DTYPES = (*DTYPES, FASTEST)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a key of `DTYPES`."""
    import torch

    return getattr(torch, DTYPES[name])


def resolve_device(name: str) -> torch.device:
    """Turn --device into a torch.device; "auto" is CUDA where there is one, else the CPU.

    Raises:
        UserError: an unknown device, or one that this machine does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,2})?", name):
        raise UserError(f"unknown device '{name}'; use cuda, cuda:N or cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name} does not exist: torch sees {count or 'no'} CUDA GPU(s); use another or cpu")
    return device


def bf16_is_faster(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster: on any GPU, and on a CPU with instructions for them."""
    import torch

    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def inference_dtype(name: str | None, device: torch.device) -> str | None:
    """Resolve a --dtype of `INFERENCE_DTYPES` to a key of `DTYPES`; None keeps the checkpoint's own dtype."""
    if name != FASTEST:
        return name
    return "bf16" if bf16_is_faster(device) else None


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 (10 bits of mantissa) in fp32 matrix products on CUDA, inside the block or function.

    Forward passes may use it; Hessians and the systems solved with them must not.
    """
    import torch

    before = torch.backends.cuda.matmul.fp32_precision
    use_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def use_tf32(allowed: bool) -> None:
    """Like `tf32`, from now on."""
    import torch

    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the CUDA device, or of this process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def return_freed_memory() -> None:
    """Return freed memory to the operating system.

    glibc keeps it, and cannot reuse it for large tensors if small long-lived objects lie in between: after thirty
    decoder layers the unusable part was as large as the part in use.
    """
    if libc := _glibc():
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensors from now on; the process then never shrinks.

    glibc gets every large tensor from the operating system, which fills each page with zeros when it is first written:
    a third of the time of an evaluation.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if libc := _glibc():
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # the limit of older versions
        libc.mallopt(trim_threshold, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
