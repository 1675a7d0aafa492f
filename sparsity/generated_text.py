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

from sparsity.attention import use_blocked_attention
from sparsity.devices import bf16_is_faster, keep_freed_memory, return_freed_memory
from sparsity.distributed import hide_bar
from sparsity.errors import UserError
from sparsity.files import atomic_path, prepare_output_dir, remove_leftovers
from sparsity.kv_cache import preallocate
from sparsity.models import cache_name, few_values, head_counts, load_config, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCES_AT_ONCE = 64  # each step reads all weights once, for however many sequences
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


def generate_text(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    device: torch.device,
    seed: int = 0,
    trust_remote_code: bool = False,
    folder: Path | None = None,
    part: tuple[int, int] = (0, 1),
    dense: PreTrainedModel | None = None,
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
        dense: the same model where it is loaded already, in any precision. If all is in the cache, none is loaded then.

    Returns:
        int64 [sequences, length] on the CPU; of a part only its own.

    Raises:
        UserError: the model cannot be loaded, has no output head, or gives no finite probabilities; no memory for it.
    """
    if device.type == "cpu":
        keep_freed_memory()  # from token to token
    dtype = _dtype(model_name, device, trust_remote_code)
    model = load_model(model_name, dtype, trust_remote_code) if dense is None else dense
    if model.get_output_embeddings() is None:
        raise UserError(f"'{model_name}' has no output head to write text with; give text files in place of 'self'")
    prompt = prompt_of(tokenizer)[: length - 1]
    most = sequences_at_once(model, length, dtype)
    settings = [length, seed, most, len(tokenizer), prompt, device.type, str(dtype)]
    kept = prepare_output_dir((folder or cache_folder()) / _key(model, settings, dtype))
    remove_leftovers(kept)
    first, step = part
    numbers = range(first, batch_count(sequences, most), step)
    files = {number: kept / f"batch_{number:04d}.safetensors" for number in numbers}
    size = token_count(model, len(tokenizer))
    found = {
        number: tokens
        for number, file in files.items()
        if (tokens := _load(file, most, length, prompt, size)) is not None
    }
    missing = [number for number in numbers if number not in found]
    try:
        if missing:
            if dense is not None:
                model = load_model(model_name, dtype, trust_remote_code)
            model.to(device)
            use_blocked_attention(model, device)
        with tqdm(total=len(missing) * length, desc="self text", unit="step", disable=hide_bar() or not missing) as bar:
            for number in missing:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                found[number] = write_batch(model, most, length, generator, len(tokenizer), prompt, bar)
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


def batch_count(sequences: int, most: int) -> int:
    """How many batches of `most` sequences hold `sequences` or a few more."""
    return -(-sequences // most)


def _dtype(model_name: str, device: torch.device, trust_remote_code: bool) -> torch.dtype:
    """The precision to write in: the checkpoint's own on a GPU, the faster one of two on a CPU."""
    if device.type == "cpu":
        return writing_dtype(device)
    own = getattr(load_config(model_name, trust_remote_code), "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


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
    size = token_count(model, vocabulary)
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
            cache = {cache_name(output): preallocate(output[cache_name(output)], length)}
        tokens[:, known] = draw(output.logits[:, -1, :size], generator).cpu()
        if bar is not None:
            bar.update(known - done)
        done, known = known, known + 1
    if bar is not None:
        bar.update(known - done)
    return tokens


def token_count(model: PreTrainedModel, vocabulary: int) -> int:
    """How many token ids may be drawn: a tokenizer's vocabulary and a model's output can each be the larger one."""
    return min(vocabulary, model.get_output_embeddings().weight.shape[0])


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


def writing_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a model writes on the CPU, and in which most checkpoints that write on a GPU are stored."""
    return torch.bfloat16 if bf16_is_faster(device) else torch.float32


def sequences_at_once(model: PreTrainedModel, length: int, dtype: torch.dtype) -> int:
    """As many as a cache in this precision may hold, at most `SEQUENCES_AT_ONCE`."""
    return max(1, min(SEQUENCES_AT_ONCE, MOST_CACHE_BYTES // _cache_bytes(model, length, dtype)))


def _cache_bytes(model: PreTrainedModel, length: int, dtype: torch.dtype) -> int:
    """Keys and values of one sequence."""
    config = model.config.get_text_config()
    _, kept_heads, width = head_counts(config)
    return 2 * length * config.num_hidden_layers * kept_heads * width * dtype.itemsize


def writing_bytes(model: PreTrainedModel, length: int) -> int:
    """What a model needs at once to write text: weights, the cache, and the logits in three copies of 32-bit floats."""
    at_once = sequences_at_once(model, length, model.dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = at_once * model.config.get_text_config().vocab_size
    return weights + at_once * _cache_bytes(model, length, model.dtype) + 12 * logits


def _key(model: PreTrainedModel, settings: list, dtype: torch.dtype) -> str:
    """Hash of what decides the text: a few values of every weight as in `dtype`, all shapes, and the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        values = torch.tensor(few_values(tensor)).to(dtype).tolist()
        digest.update(f"{name} {list(tensor.shape)} {values}".encode())
    return digest.hexdigest()[:32]


def _load(path: Path, count: int, length: int, prompt: Sequence[int], size: int) -> Tensor | None:
    """A finished batch of `write_batch`, or None where there is none that is whole."""
    try:
        tokens = load_file(path)["input_ids"]
    except (SafetensorError, OSError, KeyError):
        return None
    if tokens.shape != (count, length) or tokens.dtype != torch.long:
        return None
    begins = (tokens[:, : len(prompt)] == torch.tensor(prompt, dtype=torch.long)).all()
    drawn = tokens[:, len(prompt) :]
    return tokens if begins and ((drawn >= 0) & (drawn < size)).all() else None
