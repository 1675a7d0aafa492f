"""Predictions on disk: written as they are made, and reused by the same run after a kill."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.distributed import is_main_process
from sparsity.errors import UserError
from sparsity.files import append_jsonl, is_whole_number, lock_output_dir, prepare_output_dir, read_jsonl, save_jsonl
from sparsity.text import PromptTemplate, valid_unicode

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def file_stamp(path: str | Path) -> list[Any]:
    """What identifies a model folder's or state's content without reading gigabytes: names, sizes and write times."""
    path = Path(path).resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [str(path), *([item.name, item.stat().st_size, item.stat().st_mtime_ns] for item in files if item.is_file())]


def settings_key(
    args: argparse.Namespace,
    records: list[dict[str, str]],
    config: PretrainedConfig,
    device: torch.device,
    template: PromptTemplate,
) -> str:
    """Digest of all that can change a prediction: data, model, state, prompt, generation settings and versions."""
    import transformers

    local = Path(args.model_dir).is_dir()
    model = file_stamp(args.model_dir) if local else [args.model_dir, getattr(config, "_commit_hash", None)]
    state = file_stamp(args.modelopt_restore_path) if args.modelopt_restore_path else None
    names = ("batch_size", "beam_size", "model_max_length", "max_new_tokens", "min_new_tokens", "dtype")
    settings = {name: vars(args)[name] for name in names}
    versions = [torch.__version__, transformers.__version__]
    everything = [records, model, state, astuple(template), device.type, versions, settings]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


class PredictionLog:
    """Predictions on disk as they are made, so that a killed evaluation resumes where it stopped.

    Every process appends whole batches to its own `FILE.part-RANK`; at the end one process writes FILE itself, in
    data order, and removes the parts. Each line carries the run's key, and lines of another key are never used.

    Args:
        references: the texts that the predictions are scored against.
    """

    def __init__(self, path: str | Path, key: str, references: list[str]):
        self.path, self.key, self.references = Path(path), key, references

    def check(self) -> None:
        """Reserve FILE for this run until it exits.

        Raises:
            UserError: FILE cannot be written, is something other than a predictions file, or another run writes it.
        """
        prepare_output_dir(self.path.parent)
        is_foreign = self.path.is_file() and self.path.stat().st_size and not list(_prediction_lines(self.path))
        if self.path.is_dir() or is_foreign:
            raise UserError(f"--predictions {self.path} exists and holds something else; choose another file name")
        if is_main_process():
            lock_output_dir(self.path.parent, self.path.name)

    def load(self) -> dict[int, str]:
        """Predictions of this very run that are already on disk, by example index."""
        lines = [line for path in (self.path, *self._parts()) for line in _prediction_lines(path, self.key)]
        return {line["index"]: line["prediction"] for line in lines if line["index"] < len(self.references)}

    def append(self, rank: int, predictions: dict[int, str]) -> None:
        """Add predictions by example index; they are on disk when this returns."""
        append_jsonl(self._lines(predictions), self.path.with_name(f"{self.path.name}.part-{rank}"))

    def finish(self, predictions: dict[int, str]) -> None:
        """Write the complete file, whole or not at all, and drop the parts."""
        save_jsonl(self._lines(predictions), self.path)
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _lines(self, predictions: dict[int, str]) -> list[dict[str, Any]]:
        return [
            {"index": index, "prediction": text, "reference": self.references[index], "run": self.key}
            for index, text in sorted(predictions.items())
        ]

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.part-"
        return sorted(item for item in self.path.parent.iterdir() if item.name.startswith(prefix))


def _prediction_lines(path: Path, key: str | None = None) -> Iterator[dict[str, Any]]:
    """Whole, well-formed lines of a predictions file (all keys for None); half-written ones are skipped."""
    for line in read_jsonl(path, "predictions", skip_damaged=True) if path.is_file() else ():
        if not isinstance(line, dict) or (key is not None and line.get("run") != key):
            continue
        index, text = line.get("index"), line.get("prediction")
        if is_whole_number(index) and index >= 0 and isinstance(text, str) and valid_unicode(text) == text:
            yield line
