"""Batched summary generation for evaluation: length-sorted batches, left padding, and a log that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils import UserError, atomic_path, prepare_output_dir

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def length_sorted_batches(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches of similar length, longest first.

    Similar lengths waste little on padding, and the longest batch coming first makes a lack of memory show at once.
    The batches do not depend on the number of processes, so neither do the rounding errors inside them.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def beam_search_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, beams: int, max_new_tokens: int, min_new_tokens: int
) -> GenerationConfig:
    """A GenerationConfig of beam search alone (greedy for one beam), free of the checkpoint's sampling settings.

    Generation stops at the tokenizer's end-of-text token, which training appends to answers, and at those the
    checkpoint names itself.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        early_stopping=beams > 1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )


def generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: GenerationConfig
) -> list[str]:
    """Continue every prompt and return only the new text.

    Args:
        prompts: token ids, one list per example; padded on the left to one length L. The attention mask [batch, L]
            tells `generate` where each prompt starts, and it numbers the positions from there.

    Raises:
        UserError: the GPU's memory does not hold the batch.
    """
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    inputs = {
        "input_ids": torch.tensor(padded, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    try:
        with torch.inference_mode():
            if config.num_beams > 1 and longest > 1:
                inputs |= shared_prefill(model, **inputs, beams=config.num_beams)
            output = model.generate(**inputs, generation_config=config)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with {len(prompts)} prompts of {longest} tokens; use a smaller --batch_size, "
            "--beam_size or --model_max_length, or --dtype bf16"
        ) from error
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def shared_prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, beams: int
) -> dict[str, Any]:
    """Process each prompt once for all its beams; `generate` alone would process it once per beam.

    Args:
        input_ids, attention_mask: int64 tensors [batch, L], L > 1, padded on the left.

    Returns:
        {"past_key_values": cache of the first L - 1 tokens for batch * beams rows}, to go on with in `generate`; empty
        for a model that takes no positions or has a cache that cannot be repeated (recurrent and hybrid ones).
    """
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    try:
        # The decoder without its head: the logits of a prompt are not needed.
        output = model.base_model(**{name: tensor[:, :-1] for name, tensor in prompt.items()}, use_cache=True)
        output.past_key_values.batch_repeat_interleave(beams)
    except (AttributeError, TypeError):
        return {}
    return {"past_key_values": output.past_key_values}


# ------------------------------------------------------------------------------------- predictions on disk


def file_stamp(path: str | Path) -> list[Any]:
    """What identifies a model folder's or state's content without reading gigabytes: names, sizes and write times."""
    path = Path(path).resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [str(path), *([item.name, item.stat().st_size, item.stat().st_mtime_ns] for item in files if item.is_file())]


def run_key(**settings: Any) -> str:
    """Short digest of everything that can change a prediction."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class PredictionLog:
    """Predictions on disk as they are made, so that a killed evaluation goes on where it stopped.

    Every process appends whole batches to its own `FILE.part-RANK`; at the end one process writes FILE itself, in
    data order, and removes the parts. Each line carries the run's key, and lines of another key are never used.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key

    def check(self) -> None:
        """Raise a UserError if FILE cannot be written or is something other than a predictions file."""
        prepare_output_dir(self.path.parent)
        if self.path.is_dir():
            raise UserError(f"--predictions {self.path} is a folder; give a file name")
        if self.path.is_file() and self.path.stat().st_size and not list(_prediction_lines(self.path)):
            raise UserError(f"--predictions {self.path} exists and holds something else; choose another file name")

    def load(self) -> dict[int, str]:
        """Predictions of this very run that are already on disk, by example index."""
        found = {}
        for path in (self.path, *self._parts()):
            found.update({line["index"]: line["prediction"] for line in _prediction_lines(path, self.key)})
        return found

    def append(self, rank: int, lines: Iterable[dict[str, Any]]) -> None:
        """Add finished examples; they are on disk when this returns."""
        part = self.path.with_name(f"{self.path.name}.part-{rank}")
        text = "".join(json.dumps({**line, "run": self.key}, ensure_ascii=False) + "\n" for line in lines)
        with open(part, "ab") as stream:
            # A kill may have left half a line behind: an empty line is harmless, a glued one would be lost.
            stream.write(b"\n" + text.encode() if stream.tell() else text.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write the complete file, whole or not at all, and drop the parts."""
        with atomic_path(self.path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            for line in lines:
                stream.write(json.dumps({**line, "run": self.key}, ensure_ascii=False) + "\n")
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.part-"
        return sorted(item for item in self.path.parent.iterdir() if item.name.startswith(prefix))


def _prediction_lines(path: Path, key: str | None = None) -> Iterator[dict[str, Any]]:
    """Whole, well-formed lines of a predictions file (all keys for None); half-written ones are skipped."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            whole = isinstance(line, dict) and isinstance(line.get("index"), int) and "prediction" in line
            if whole and (key is None or line.get("run") == key):
                yield line
