"""Functions of many small CUDA kernels, which a GPU finishes sooner than Python can start them one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def replayed(function: Function, *arguments: Tensor) -> tuple[Tensor, ...]:
    """`function(*arguments)`; on CUDA its kernels are recorded at the first call for arguments of such shapes.

    The function may neither wait for the device nor change its arguments. The next such call overwrites the results.
    """
    device = arguments[0].device
    if device.type != "cuda":
        return function(*arguments)
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in arguments)
    with torch.cuda.device(device):
        return _recorded(function, shapes, device)(*arguments)


@lru_cache(maxsize=16)
def _recorded(function: Function, shapes: tuple[tuple[torch.Size, torch.dtype], ...], device: torch.device) -> Function:
    inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)  # lets libraries set up what they do at their first call
        graph.capture_begin(capture_error_mode="thread_local")  # another thread may be reading the next layer
        outputs = function(*inputs)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        for memory, argument in zip(inputs, arguments, strict=True):
            memory.copy_(argument)
        graph.replay()
        return outputs

    return replay
