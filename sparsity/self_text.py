"""Text that a model writes itself, as calibration or training data without any data set.

Sampled at temperature 1, it is spread over everything that the model knows: prose, code, dialogue, tables. An
instruct model begins with a user's turn of its chat template, so that it writes questions with its answers; any other
model begins with a random token. Pruning that is calibrated on such text in part loses less on other kinds of text
than the rest of the calibration set (docs/measurements.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsity.devices import bf16_is_faster, return_freed_memory
from sparsity.errors import UserError
from sparsity.files import atomic_path, prepare_output_dir
from sparsity.models import cache_name, few_values, head_counts, load_model
from sparsity.processes import hide_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCES_AT_ONCE = 32  # each step reads all weights once, for however many sequences
MOST_CACHE_BYTES = 2**30  # of keys and values
TOKENS_IN_A_SUM = 256  # of probabilities, when a token is drawn


def cache_folder() -> Path:
    """Where texts are kept from run to run: hf-sparsity in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-sparsity" / "self_text"


def prompt_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that open a user's turn in the tokenizer's chat template; [] where it has none.

    They are those of a second turn. A first turn comes behind the template's own system prompt, with which a model
    writes as an assistant only: far less varied text, and far worse calibration.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [("user", "USER ONE"), ("assistant", "ANSWER ONE"), ("user", "USER TWO")]
    try:
        chat = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program by anybody: without it the text begins with a random token
        return []
    between = text.partition("ANSWER ONE")[2].partition("USER TWO")[0].lstrip()
    end = next((token for token in tokenizer.all_special_tokens if between.startswith(token)), "")
    return tokenizer(between[len(end) :].lstrip(), add_special_tokens=False)["input_ids"]


def self_text(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    device: torch.device,
    seed: int = 0,
    trust_remote_code: bool = False,
    folder: Path | None = None,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Text by a dense model, from the cache as far as it is there.

    Every batch is kept as soon as it is finished, so that an interrupted run resumes behind it, and a longer text
    begins with a shorter one. The same arguments give the same text, whatever the cache holds.

    Args:
        model_name: hub id or folder.
        tokenizer: the model's, for its chat template and the number of tokens; a model may have room for more.
        folder: the cache, by default `cache_folder()`.
        part: number of this process, and of all that share the writing: each takes every `part[1]`-th batch. Once all
            have written, anyone finds the whole text in the cache.

    Returns:
        int64 [sequences, length] on the CPU; of a part only its own.

    Raises:
        UserError: the model cannot be loaded, has no output head, or gives no finite probabilities; no memory for it.
    """
    model = load_model(model_name, writing_dtype(device) if device.type == "cpu" else "auto", trust_remote_code)
    if model.get_output_embeddings() is None:
        raise UserError(f"'{model_name}' has no output head to write text with; give text files in place of 'self'")
    at_once = sequences_at_once(model, length)
    prompt = prompt_of(tokenizer)[: length - 1]
    settings = [length, seed, at_once, len(tokenizer), prompt, device.type, str(model.dtype)]
    kept = prepare_output_dir((folder or cache_folder()) / _key(model, settings))
    first, step = part
    numbers = range(first, -(-sequences // at_once), step)
    files = {number: kept / f"batch_{number:04d}.safetensors" for number in numbers}
    found = {number: tokens for number, file in files.items() if (tokens := _load(file, at_once, length)) is not None}
    missing = [number for number in numbers if number not in found]
    try:
        if missing:
            model.to(device)
        with tqdm(total=len(missing) * length, desc="self text", unit="step", disable=hide_bar() or not missing) as bar:
            for number in missing:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                found[number] = write_batch(model, at_once, length, generator, len(tokenizer), prompt, bar)
                with atomic_path(files[number]) as temporary:
                    save_file({"input_ids": found[number]}, temporary)
    except torch.OutOfMemoryError as error:
        raise UserError(f"'{model_name}' and its cache do not fit on {device}; give text files, not 'self'") from error
    del model  # before anything else takes memory
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    batches = [found[number] for number in numbers]
    return torch.cat(batches)[:sequences] if batches else torch.empty(0, length, dtype=torch.long)


@torch.inference_mode()
def write_batch(
    model: PreTrainedModel,
    count: int,
    length: int,
    generator: torch.Generator,
    vocabulary: int,
    prompt: Sequence[int] = (),
    bar: tqdm | None = None,
) -> Tensor:
    """Sample `count` sequences at once, each next token from the model's own distribution.

    Args:
        vocabulary: only token ids below it are drawn.
        prompt: token ids that all sequences begin with; without any, each begins with a token at random.

    Returns:
        int64 [count, length] on the CPU, prompts included. An end-of-text token does not end a sequence: another text
        follows it.

    Raises:
        UserError: probabilities are not finite.
    """
    size = min(vocabulary, model.get_output_embeddings().weight.shape[0])
    tokens = torch.empty(count, length, dtype=torch.long)
    if prompt:
        tokens[:, : len(prompt)] = torch.tensor(prompt)
    else:
        tokens[:, 0] = torch.randint(0, size, (count,), generator=generator)
    cache: dict[str, Any] = {}
    done, known = 0, max(1, len(prompt))
    while known < length:
        output = model(input_ids=tokens[:, done:known].to(model.device), use_cache=True, **cache)
        if not cache:
            cache = {cache_name(output): _with_room(output[cache_name(output)], length)}
        tokens[:, known] = draw(output.logits[:, -1, :size], generator).cpu()
        if bar is not None:
            bar.update(known - done)
        done, known = known, known + 1
    if bar is not None:
        bar.update(known - done)
    return tokens


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row [rows] from the softmax of logits [rows, vocabulary].

    By inversion of the distribution function, summed in two levels: several times as fast as torch.multinomial.

    Raises:
        UserError: the logits are not finite.
    """
    logits = logits.float()
    rows, size = logits.shape
    highest = logits.amax(1, keepdim=True)
    if not torch.isfinite(highest).all():
        raise UserError(
            "the model's output is NaN or infinite, so it cannot write text; give text files in place of 'self'"
        )
    weights = F.pad((logits - highest).exp_(), (0, -size % TOKENS_IN_A_SUM)).view(rows, -1, TOKENS_IN_A_SUM)
    sums = weights.sum(-1).double().cumsum(-1)
    point = torch.rand(rows, 1, generator=generator, dtype=torch.double).to(sums.device) * sums[:, -1:]
    block = torch.searchsorted(sums, point, right=True).clamp(max=sums.shape[1] - 1)
    rest = point - torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    token = torch.searchsorted(inside, rest, right=True).clamp(max=TOKENS_IN_A_SUM - 1)
    return (block * TOKENS_IN_A_SUM + token).clamp(max=size - 1)[:, 0]


class RoomyLayer(DynamicLayer):
    """A cache layer with room for `length` positions, instead of one that is copied for every token."""

    def __init__(self, layer: DynamicLayer, length: int):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        used = layer.keys.shape[-2]
        self._buffers = []
        for tensor in (layer.keys, layer.values):
            buffer = tensor.new_empty(*tensor.shape[:-2], length, tensor.shape[-1])
            buffer[..., :used, :] = tensor
            self._buffers.append(buffer)
        self.keys, self.values = (buffer[..., :used, :] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, new positions, width]; return all so far."""
        used = self.keys.shape[-2]
        end = used + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., used:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def _with_room(cache: Any, length: int) -> Any:
    """The model's cache, its layers replaced where they are of the kind that grows by copying."""
    if isinstance(cache, DynamicCache):
        cache.layers = [RoomyLayer(layer, length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def writing_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a model writes on the CPU, and in which most checkpoints that write on a GPU are stored."""
    return torch.bfloat16 if bf16_is_faster(device) else torch.float32


def sequences_at_once(model: PreTrainedModel, length: int) -> int:
    """As many as the cache may hold, at most `SEQUENCES_AT_ONCE`; it depends only on the model and the length."""
    return max(1, min(SEQUENCES_AT_ONCE, MOST_CACHE_BYTES // _cache_bytes(model, length)))


def _cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Keys and values of one sequence."""
    config = model.config.get_text_config()
    _, kept_heads, width = head_counts(config)
    return 2 * length * config.num_hidden_layers * kept_heads * width * model.dtype.itemsize


def writing_bytes(model: PreTrainedModel, length: int) -> int:
    """What a model needs at once to write text: weights, the cache, and the logits in three copies of 32-bit floats."""
    at_once = sequences_at_once(model, length)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = at_once * model.config.get_text_config().vocab_size
    return weights + at_once * _cache_bytes(model, length) + 12 * logits


def _key(model: PreTrainedModel, settings: list) -> str:
    """Hash of what decides the text: a few values of every weight, the configuration's sizes, the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {few_values(tensor)}".encode())
    return digest.hexdigest()[:32]


def _load(path: Path, count: int, length: int) -> Tensor | None:
    """A finished batch, or None where there is none that is whole."""
    try:
        tokens = load_file(path)["input_ids"]
    except (SafetensorError, OSError, KeyError):
        return None
    return tokens if tokens.shape == (count, length) and tokens.dtype == torch.long else None
