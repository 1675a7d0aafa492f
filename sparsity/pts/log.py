"""What a pruning run records of every pruned matrix: a row in memory, a line in pts_layers.jsonl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sparsity.files import save_jsonl


@dataclass
class MatrixLog:
    """One pruned weight matrix.

    Attributes:
        name: of the linear layer within the model.
        shape: [out, in].
        relative_error: ‖S X - W X‖² / ‖W X‖² on the calibration set, S being the pruned and W the dense weight;
            None without a calibration set.
        sparsity: share of zeros.
        percdamp: damping that was used, as a share of the Hessian's mean diagonal; None without a Hessian.
        seconds: this matrix's share of the time to prune its group.
        layer_seconds: the whole decoder layer, calibration passes included.
        peak_memory_mib: of the device so far, in MiB; of the process on the CPU.
    """

    name: str
    shape: list[int]
    relative_error: float | None
    sparsity: float
    percdamp: float | None
    seconds: float
    layer_seconds: float = 0.0
    peak_memory_mib: float = 0.0


def save_log(rows: list[MatrixLog], path: Path) -> None:
    """Write pts_layers.jsonl, one line per matrix, whole or not at all."""
    save_jsonl((asdict(row) for row in rows), path)
