"""Self-generated text: a model samples text that serves as calibration or training data without any data set.

Sampled at temperature 1, it is spread over everything that the model knows: prose, code, dialogue, tables. An
instruct model begins with a user's turn of its chat template, so that it writes questions with its answers; any other
model begins with a random token. A model that is pruned with such text in the calibration set loses less on other kinds
of text (docs/measurements.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from sparsity.attention import use_blocked_attention
from sparsity.devices import bf16_is_faster, keep_freed_memory, return_freed_memory
from sparsity.distributed import hide_bar
from sparsity.errors import UserError
from sparsity.files import atomic_path, is_sealed, prepare_output_dir, seal
from sparsity.models import few_values, head_counts, load_config, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCES_AT_ONCE = 64  # each step reads all weights once, for any number of sequences
MOST_CACHE_BYTES = 2**30  # of keys and values
TOKENS = "tokens.safetensors"


def cache_folder() -> Path:
    """The folder of texts that all runs share: hf-sparsity in $XDG_CACHE_HOME or ~/.cache; else a temporary one."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-sparsity" / "self_text"
    try:
        return prepare_output_dir(home)
    except UserError:  # a home that cannot be written, as in many containers
        return Path(tempfile.gettempdir()) / f"hf-sparsity-{os.getuid()}" / "self_text"


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
        part: index of this process and number of processes that share the work: each takes every `part[1]`-th batch.
        dense: the same model in any precision, where it is loaded already; another one is loaded only to write.

    Returns:
        int64 [sequences, length] on the CPU; with `part`, only the batches of this process.

    Raises:
        UserError: the model cannot be loaded, has no output head, or gives no finite probabilities.
    """
    if device.type == "cpu":
        keep_freed_memory()  # from token to token
        dtype = writing_dtype(device)
    else:
        own = load_config(model_name, trust_remote_code).dtype
        dtype = own if isinstance(own, torch.dtype) else torch.float32
    model = load_model(model_name, dtype, trust_remote_code) if dense is None else dense
    if model.get_output_embeddings() is None:
        raise UserError(f"'{model_name}' has no output head to write text with; give text files in place of 'self'")
    prompt = prompt_of(tokenizer)[: length - 1]
    rows = sequences_at_once(model, length, dtype)
    settings = [length, seed, rows, len(tokenizer), prompt, device.type, str(dtype)]
    kept = (folder or cache_folder()) / _key(model, settings, dtype)
    folders = {n: kept / f"batch_{n:04d}" for n in range(part[0], math.ceil(sequences / rows), part[1])}
    missing = [number for number in folders if not is_sealed(folders[number], TOKENS)]
    if missing:
        model = model if dense is None else load_model(model_name, dtype, trust_remote_code)
        model.to(device)
        use_blocked_attention(model, device)
    for number in missing:
        tokens = write_batch(model, rows, length, seed * 1_000_003 + number, len(tokenizer), prompt)
        with atomic_path(prepare_output_dir(folders[number]) / TOKENS) as temporary:
            save_file({"input_ids": tokens}, temporary)
        seal(folders[number])
    del model  # before anything else takes memory
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    batches = [load_file(folder / TOKENS)["input_ids"] for folder in folders.values()]
    return torch.cat(batches)[:sequences] if batches else torch.empty(0, length, dtype=torch.long)


def prompt_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that open a user's turn in the tokenizer's chat template; [] without a template.

    They are those of a second turn. A first turn follows the template's own system prompt, with which a model writes as
    an assistant only: far less varied text, and far worse calibration.
    """
    if not tokenizer.chat_template:
        return []
    turns = [("user", "USER ONE"), ("assistant", "ANSWER ONE"), ("user", "USER TWO")]
    text = ""
    with contextlib.suppress(Exception):  # a template is a program by anybody, and may raise anything
        chat = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    between = text.partition("ANSWER ONE")[2].partition("USER TWO")[0].lstrip()
    end = next((token for token in tokenizer.all_special_tokens if between.startswith(token)), "")
    return tokenizer(between[len(end) :].lstrip(), add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def write_batch(
    model: PreTrainedModel, rows: int, length: int, seed: int, vocabulary: int, prompt: Sequence[int]
) -> Tensor:
    """Sample `rows` sequences at once, each next token from the model's own distribution.

    Args:
        vocabulary: only token ids below it are drawn.
        prompt: token ids that all sequences begin with; without any, each begins with a token at random.

    Returns:
        int64 [rows, length] on the CPU, prompts included. An end-of-text token does not end a sequence: another text
        follows it.

    Raises:
        UserError: the probabilities are not finite.
    """
    # A tokenizer's vocabulary and a model's output can each be the larger one.
    size = min(vocabulary, model.get_output_embeddings().weight.shape[0])
    # In place of the checkpoint's own settings, which `generate` would mix with those that it is given.
    model.generation_config = GenerationConfig(max_length=length)
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor(prompt).expand(rows, -1) if prompt else torch.randint(size, (rows, 1), generator=generator)
    first = first.to(model.device)
    bar = tqdm(desc="self-generated text", total=length, unit="token", leave=False, disable=hide_bar())

    def draw(_: Tensor, logits: Tensor) -> Tensor:
        """Leave one token per row, drawn by inverting the distribution function.

        On a CPU, `generate` with do_sample=True takes 1.1 to 1.3 times as long.
        """
        bar.update()
        sums = torch.softmax(logits[:, :size], 1).cumsum(1)
        if not torch.isfinite(sums[:, -1]).all():
            raise UserError("the model's output is NaN or infinite, so it cannot write text; give files, not 'self'")
        point = torch.rand(rows, 1, generator=generator).to(sums.device) * sums[:, -1:]
        token = torch.searchsorted(sums, point, right=True).clamp_(max=size - 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

    with bar:
        return model.generate(first, attention_mask=torch.ones_like(first), logits_processor=[draw]).cpu()


def writing_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a model writes on the CPU, and in which most checkpoints that write on a GPU are stored."""
    return torch.bfloat16 if bf16_is_faster(device) else torch.float32


def sequences_at_once(model: PreTrainedModel, length: int, dtype: torch.dtype) -> int:
    """The largest power of two whose cache fits in `MOST_CACHE_BYTES`, at most `SEQUENCES_AT_ONCE`.

    Batches are written whole: 64 sequences are two batches of 32, while batches of 45 would write 90.
    """
    most = max(1, min(SEQUENCES_AT_ONCE, MOST_CACHE_BYTES // _cache_bytes(model, length, dtype)))
    return 2 ** (most.bit_length() - 1)


def _cache_bytes(model: PreTrainedModel, length: int, dtype: torch.dtype) -> int:
    """Keys and values of one sequence."""
    config = model.config.get_text_config()
    _, num_kv_heads, width = head_counts(config)
    return 2 * length * config.num_hidden_layers * num_kv_heads * width * dtype.itemsize


def _key(model: PreTrainedModel, settings: list, dtype: torch.dtype) -> str:
    """Hash of what decides the text: a few values of every weight as in `dtype`, all shapes, and the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        values = torch.tensor(few_values(tensor)).to(dtype).tolist()
        digest.update(f"{name} {list(tensor.shape)} {values}".encode())
    return digest.hexdigest()[:32]
