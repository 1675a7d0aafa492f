"""Finished decoder layers on disk, so that a pruning run that was killed can resume where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsity.files import atomic_path, save_json
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
    """

    def __init__(self, folder: Path | None, key: str, writer: bool = True):
        self.folder, self.writer = folder, writer
        if folder is None or not writer:
            return
        try:
            known = json.loads((folder / "fingerprint.json").read_text())
        except (OSError, ValueError):
            known = None
        if known != key:
            shutil.rmtree(folder, ignore_errors=True)
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

    def has(self, index: int) -> bool:
        """Whether the layer's file exists and is complete: its header agrees with its length."""
        if self.folder is None or not self._path(index).is_file():
            return False
        try:
            with safe_open(self._path(index), framework="pt") as file:
                json.loads(file.metadata()["rows"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def load(self, index: int, layer: nn.Module) -> tuple[dict[str, Tensor], list[MatrixLog]]:
        """Map the weights of a layer that the store has into `layer` (on the CPU).

        Returns:
            masks by name, log rows.
        """
        tensors = load_file(self._path(index))
        with safe_open(self._path(index), framework="pt") as file:
            rows = [MatrixLog(**row) for row in json.loads(file.metadata()["rows"])]
        weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        layer.load_state_dict(weights, assign=True)
        return {k.removeprefix("mask."): v for k, v in tensors.items() if k.startswith("mask.")}, rows

    def remove(self) -> None:
        """Forget everything: the run is finished and saved."""
        if self.folder is not None and self.writer:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        assert self.folder is not None  # callers ask before
        return self.folder / f"layer_{index:04d}.safetensors"
