"""Finished decoder layers on disk, so that a pruning run that was killed can resume where it stopped; the log."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity.errors import reported_as
from sparsity.files import atomic_path, is_sealed, open_safetensors, seal
from sparsity.models import few_values
from sparsity.pts.recipe import Recipe


@dataclass
class MatrixLog:
    """One pruned weight matrix: a row in memory, a line in pts_layers.jsonl.

    Attributes:
        name: of the linear layer within the model.
        shape: [out, in].
        relative_error: ‖S X - W X‖² / ‖W X‖² on the calibration set, S being the pruned and W the dense weight;
            None without a calibration set.
        sparsity: fraction of zeros.
        percdamp: damping that was used, as a fraction of the Hessian's mean diagonal; None without a Hessian.
        seconds: this matrix's part of the time to prune its group.
        layer_seconds: the whole decoder layer, calibration passes included.
        tokens: number of calibration tokens that an expert saw; None of other layers.
    """

    name: str
    shape: list[int]
    relative_error: float | None
    sparsity: float
    percdamp: float | None
    seconds: float
    layer_seconds: float = 0.0
    tokens: int | None = None


def calibration_key(
    recipe: Recipe,
    settings: list,
    batches: list[dict[str, Tensor]],
    model: nn.Module,
    token_weights: Sequence[float] | None = None,
) -> str:
    """Hash of everything that decides the result, so that a resumed run never mixes two settings.

    Args:
        settings: JSON values that decide the result in addition to the recipe.
        batches: this run's calibration batches.  model: dense, on the CPU.
        token_weights: weight of the tokens of each batch; None if all are equal.
    """
    decisive = [asdict(recipe), settings, list(token_weights or [])]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {few_values(tensor)}".encode())
    return digest.hexdigest()


class LayerStore:
    """One sealed safetensors file per finished layer, in a subfolder named after the run's `calibration_key`.

    The hidden states are not stored: running the finished layers again gives the same bits and needs no disk. Finished
    layers are mapped from their files into the model, so that they need no more of the host's memory than the mapped
    checkpoint they came from.

    Args:
        folder: None keeps nothing.
        writer: False in all but one of several processes; the others only read.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, key: str, writer: bool = True):
        self.folder, self.writer = folder and folder / key, writer
        if self.folder and writer and not self.folder.is_dir():
            self.remove()  # what a run with other settings has left
            with reported_as(f"cannot use {folder}; remove it by hand", OSError):
                self.folder.mkdir(parents=True)

    def has(self, index: int) -> bool:
        """Whether the layer is finished."""
        return self.folder is not None and is_sealed(self.folder, _file(index))

    def save(self, index: int, layer: nn.Module, masks: dict[str, Tensor], rows: list[MatrixLog]) -> dict[str, Tensor]:
        """Write the layer's weights, its masks (by name within the model) and its log rows, whole or not at all.

        Returns:
            the masks, mapped from the file.
        """
        if self.folder is None or not self.writer:
            return masks
        tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
        tensors |= {f"mask.{name}": mask.contiguous() for name, mask in masks.items()}
        with atomic_path(self.folder / _file(index)) as temporary:
            save_file(tensors, temporary, metadata={"rows": json.dumps([asdict(row) for row in rows])})
        seal(self.folder, _file(index))
        return self.load(index, layer)[0]

    def load(self, index: int, layer: nn.Module) -> tuple[dict[str, Tensor], list[MatrixLog]]:
        """Map the weights of a layer that the store has into `layer` (on the CPU).

        Returns:
            masks by name, log rows.
        """
        assert self.folder is not None  # `has` says so
        path = self.folder / _file(index)
        with open_safetensors(path) as file:
            rows = [MatrixLog(**row) for row in json.loads(file.metadata()["rows"])]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
        weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        layer.load_state_dict(weights, assign=True)
        return {k.removeprefix("mask."): v for k, v in tensors.items() if k.startswith("mask.")}, rows

    def remove(self) -> None:
        """Forget everything: the run is finished and saved."""
        if self.folder is not None and self.writer:
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def _file(index: int) -> str:
    return f"layer_{index:04d}.safetensors"
