"""How long this machine takes for what took one second on the machine whose times quickstart.sh knows.

python -m tools.pace        prints a factor, e.g. 2.0 on a machine half as fast
"""

from __future__ import annotations

import time

import torch

from sparsity.devices import bf16_is_faster, resolve_device

# Two cores of an AMD EPYC without AMX, without other work on them.
REFERENCE_SECONDS = 0.42
OTHER_WORK = 0.3  # part of the time that the products' speed does not change: imports, Python, small operations


def probe(device: torch.device) -> float:
    """Seconds of some matrix products, in bf16 where that is faster, and some passes over memory."""
    precise = torch.randn(1024, 576, device=device), torch.randn(576, 1536, device=device)
    fast = [matrix.bfloat16() for matrix in precise] if bf16_is_faster(device) else precise
    large = torch.ones(2**24, device=device)
    start = time.perf_counter()
    for _ in range(20):
        _ = precise[0] @ precise[1]
    for _ in range(40):
        _ = fast[0] @ fast[1]
    for _ in range(5):
        large.mul_(1.0001)
    large[0].item()  # waits for the device
    return time.perf_counter() - start


def main() -> None:
    device = resolve_device("auto")
    seconds = min(probe(device) for _ in range(4))  # the first also pays for starting threads
    print(f"{min(20.0, OTHER_WORK + (1 - OTHER_WORK) * seconds / REFERENCE_SECONDS):.2f}")


if __name__ == "__main__":
    main()
