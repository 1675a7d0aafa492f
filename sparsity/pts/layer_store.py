"""Finished decoder layers on disk, so that a pruning run that was killed can resume where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.files import NOT_JSON, atomic_path, is_number, save_json
from sparsity.models import few_values
from sparsity.pts.log import MatrixLog
from sparsity.pts.recipe import Recipe


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
        token_weights: what the tokens of each batch count; None if all count alike.
    """
    decisive = [asdict(recipe), settings, list(token_weights or [])]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + repr(few_values(tensor)).encode())
    return digest.hexdigest()


class LayerStore:
    """A folder with one safetensors file per finished layer, valid for one `calibration_key`.

    The hidden states are not stored: running the finished layers again gives the same bits and needs no disk. Finished
    layers are mapped from their files into the model, so that they need no more of the host's memory than the mapped
    checkpoint they came from.

    Args:
        folder: None keeps nothing.
        writer: False in all but one of several processes; the others only read.

    Raises:
        UserError: what an earlier run left there cannot be removed.
    """

    def __init__(self, folder: Path | None, key: str, writer: bool = True):
        self.folder, self.writer = folder, writer
        if folder is None or not writer:
            return
        try:
            known = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
        except (OSError, *NOT_JSON):
            known = None
        if known != key:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise UserError(f"cannot remove {folder}, which another run has left; remove it by hand")
            folder.mkdir(parents=True)
            save_json(key, folder / "fingerprint.json")

    def save(self, index: int, layer: nn.Module, masks: dict[str, Tensor], rows: list[MatrixLog]) -> dict[str, Tensor]:
        """Write the layer's weights, its masks (by name within the model) and its log rows, whole or not at all.

        Returns:
            the masks, mapped from the file.
        """
        if self.folder is None or not self.writer:
            return masks
        tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
        tensors |= {f"mask.{name}": mask.contiguous() for name, mask in masks.items()}
        with atomic_path(self._path(index)) as temporary:
            save_file(tensors, temporary, metadata={"rows": json.dumps([asdict(row) for row in rows])})
        return self.load(index, layer)[0]

    def has(self, index: int, layer: nn.Module, linears: dict[str, nn.Linear]) -> bool:
        """Whether the layer's file is whole and fits the model.

        Args:
            layer: the layer of the model.
            linears: those of its linear layers that are pruned, by name within the model.
        """
        if self.folder is None:
            return False
        try:
            weights, masks, rows = self._read(index)
        except (SafetensorError, OSError, KeyError, TypeError, *NOT_JSON):
            return False
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
        shapes = {name: linear.weight.shape for name, linear in linears.items()}
        return (
            {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} == expected
            and {name: (mask.shape, mask.dtype) for name, mask in masks.items()}
            == {name: (shape, torch.bool) for name, shape in shapes.items()}
            and len(rows) == len(shapes)
            and all([name, list(shape)] in [[row.name, row.shape] for row in rows] for name, shape in shapes.items())
            and all(_is_measured(row) for row in rows)
        )

    def load(self, index: int, layer: nn.Module) -> tuple[dict[str, Tensor], list[MatrixLog]]:
        """Map the weights of a layer that the store has into `layer` (on the CPU).

        Returns:
            masks by name, log rows.
        """
        weights, masks, rows = self._read(index)
        layer.load_state_dict(weights, assign=True)
        return masks, rows

    def _read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[MatrixLog]]:
        """Weights and masks, mapped from the layer's file, and the log rows."""
        tensors = load_file(self._path(index))
        with safe_open(self._path(index), framework="pt") as file:
            rows = [MatrixLog(**row) for row in json.loads(file.metadata()["rows"])]
        weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        return weights, {k.removeprefix("mask."): v for k, v in tensors.items() if k.startswith("mask.")}, rows

    def remove(self) -> None:
        """Forget everything: the run is finished and saved."""
        if self.folder is not None and self.writer:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        assert self.folder is not None  # callers ask before
        return self.folder / f"layer_{index:04d}.safetensors"


def _is_measured(row: MatrixLog) -> bool:
    """Whether a row from a file holds numbers where it must."""
    measured = [row.relative_error, row.percdamp]
    always = [row.sparsity, row.seconds, row.layer_seconds, row.peak_memory_mib]
    return all(map(is_number, always)) and all(value is None or is_number(value) for value in measured)
