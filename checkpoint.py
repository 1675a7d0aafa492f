"""Finished decoder layers on disk, so that a pruning run that was killed can go on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils import atomic_path, save_json


class LayerStore:
    """A folder with one safetensors file per finished layer, valid for one fingerprint of settings and inputs.

    The hidden states are not stored: running the finished layers again gives the same bits and needs no disk.
    """

    def __init__(self, folder: Path | None, fingerprint: str):
        self.folder = folder
        if folder is None:
            return
        try:
            known = json.loads((folder / "fingerprint.json").read_text())
        except (OSError, ValueError):
            known = None
        if known != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            save_json(fingerprint, folder / "fingerprint.json")

    def _path(self, index: int) -> Path | None:
        return self.folder / f"layer_{index:04d}.safetensors" if self.folder else None

    def save(self, index: int, layer: nn.Module, masks: dict[str, Tensor], rows: list[dict]) -> None:
        """Write the layer's weights, its masks (by name within the model) and its log rows, whole or not at all."""
        if self.folder is None:
            return
        tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
        tensors |= {f"mask.{name}": mask.contiguous() for name, mask in masks.items()}
        with atomic_path(self._path(index)) as temporary:
            save_file(tensors, temporary, metadata={"rows": json.dumps(rows)})

    def load(self, index: int, layer: nn.Module) -> tuple[dict[str, Tensor], list[dict]] | None:
        """Put a finished layer's weights into `layer`; None if it is not there or was damaged."""
        path = self._path(index)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                rows = json.loads(file.metadata()["rows"])
        except (SafetensorError, OSError, ValueError, KeyError):
            path.unlink()
            return None
        layer.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
        masks = {k.removeprefix("mask."): v for k, v in tensors.items() if k.startswith("mask.")}
        return masks, rows

    def remove(self) -> None:
        """Forget everything: the run is finished and saved."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
