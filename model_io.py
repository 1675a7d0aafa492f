"""Models, tokenizers and sparse states: loaded with one clear line for what is wrong with them; perplexity."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils import UserError, first_line, require_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Turn --device into a torch.device; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; use cuda, cuda:N or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} was asked for, but torch sees no CUDA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} does not exist: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def bf16_is_faster(device: torch.device) -> bool:
    """Whether matrix products gain by bfloat16 factors: on any GPU, and on a CPU with instructions for them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type != "cpu" or any(getattr(torch.cpu, name, bool)() for name in names)


def load_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a hub id or folder and check that it is a decoder-only language model.

    Raises:
        UserError: not found, unreadable, or an encoder or encoder-decoder model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model folder {model} has no config.json; give a Hugging Face model folder or hub id")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON of a wrong shape
        raise UserError(f"cannot load a model from '{model}': {first_line(error)}") from error
    decoders = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    named = config.architectures or []
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if config.is_encoder_decoder or not known or (named and not any(name.endswith(decoders) for name in named)):
        kind = named[0] if named else config.model_type
        raise UserError(f"'{model}' is a {kind}, not a decoder-only causal language model such as Llama")
    return config


def check_lengths(config: PretrainedConfig, lengths: dict[str, int]) -> None:
    """Check that token counts, named by their options, together stay within the model's positions.

    Raises:
        UserError: they do not. A model without a bound (e.g. ALiBi) passes.
    """
    text_config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(text_config, key, None)
        if isinstance(positions, int) and sum(lengths.values()) > positions:
            asked = " plus ".join(f"{name} {value}" for name, value in lengths.items())
            raise UserError(f"{asked} is more than the model's {positions} positions; choose a smaller value")


def load_model(model: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal LM on the CPU in eval mode; `dtype` "auto" keeps the checkpoint's own.

    Raises:
        UserError: the model cannot be found or its weight files are missing, truncated or misshapen.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, trust_remote_code=trust_remote_code, low_cpu_mem_usage=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load the weights of '{model}': {first_line(error)}") from error
    return loaded.eval()


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration without memory for its weights (on the meta device), for shapes and estimates."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Eager attention builds its masks without looking at values, which an empty model has not got.
        options = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token falls back to end-of-text, then to the unknown token.

    Raises:
        UserError: no tokenizer, no end-of-text token, or nothing to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a malformed tokenizer.json
        raise UserError(f"cannot load a tokenizer from '{model}': {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{model}' has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_state(path: str | Path) -> dict[str, Any]:
    """Memory-map a modelopt state file without running any pickled code.

    Returns:
        {"modelopt_state": …, "model_state_dict": name → tensor}, as `modelopt.torch.opt.save` writes it.

    Raises:
        UserError: missing, truncated or not such a file.
    """
    path = require_file(path, "modelopt state")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged zip
        raise UserError(
            f"{path} is not a readable modelopt state (damaged, truncated or unsafe): {first_line(error)}"
        ) from None
    if not isinstance(state, dict) or not {"modelopt_state", "model_state_dict"} <= state.keys():
        raise UserError(
            f"{path} is not a modelopt state: it lacks modelopt_state and model_state_dict; make it with hf_pts.py"
        )
    return state


def require_masks(state_dict: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Names of the masks of a state that was read from `path`.

    Raises:
        UserError: it has none.
    """
    masks = [name for name in state_dict if name.endswith("._weight_mask")]
    if not masks:
        raise UserError(f"state {path} holds no masks: its model was never made sparse; make one with hf_pts.py")
    return masks


def check_state_fits(state_dict: dict[str, torch.Tensor], model: nn.Module, path: str | Path) -> None:
    """Check that a state has exactly the tensors of `model` (which may be on the meta device), masks aside.

    Raises:
        UserError: names or shapes differ: the state, read from `path`, belongs to another model.
    """
    saved = {name: tensor.shape for name, tensor in state_dict.items() if not name.endswith("._weight_mask")}
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() ^ own.keys()) + sorted(n for n in saved.keys() & own.keys() if saved[n] != own[n]):
        ours, theirs = own.get(name), saved.get(name)
        raise UserError(
            f"state {path} belongs to another model: '{name}' is {list(theirs) if theirs else 'absent'} in the state "
            f"and {list(ours) if ours else 'absent'} in the model"
        )


def restore_sparse(model: PreTrainedModel, path: str | Path, fold: bool = False) -> PreTrainedModel:
    """Apply a saved modelopt state (masks and weights) to a freshly loaded dense `model`, in place.

    Args:
        fold: for inference. Multiply the masks in and leave plain layers, which give the same outputs; a layer with a
            mask multiplies it in anew at every forward pass, and that takes longer than decoding one token.

    Raises:
        UserError: the file is unreadable, or belongs to a model of other layers or sizes.
    """
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity  # registers the sparsity modes

    state = load_state(path)
    check_state_fits(state["model_state_dict"], model, path)
    try:
        model = mto.restore_from_modelopt_state(model, state["modelopt_state"])
        model.load_state_dict(state["model_state_dict"])
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"state {path} does not fit the model: {first_line(error)}") from error
    return modelopt.torch.sparsity.export(model) if fold else model


def load_for_inference(
    model: str, dtype: str | None, state: str | Path | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The dense model, or with the path of a state the sparse one with its masks folded in, on the CPU.

    Args:
        dtype: a key of DTYPES; None keeps the checkpoint's own.

    Raises:
        UserError: as `load_model` and `restore_sparse`.
    """
    loaded = load_model(model, DTYPES[dtype] if dtype else "auto", trust_remote_code)
    return restore_sparse(loaded, state, fold=True) if state else loaded


def sparse_masks(state_dict: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (weight name, weight [out, in], bool mask [out, in]) for every masked layer of a state dict."""
    for name, mask in state_dict.items():
        if name.endswith("._weight_mask"):
            weight_name = name.removesuffix("_weight_mask") + "weight"
            yield weight_name, state_dict[weight_name], mask


def perplexity(
    model: nn.Module, blocks: torch.Tensor, device: torch.device, batch_size: int = 4, stride: int | None = None
) -> float:
    """exp of the mean next-token negative log-likelihood, in nats, over blocks of token ids.

    Args:
        blocks: int64 tensor [N, T]; T - 1 tokens of each are scored.
        stride: tokens from the start of one block to the next, where blocks overlap. Blocks after the first are then
            scored on their last `stride` tokens only, so that no token counts twice.
    """
    from tqdm import tqdm

    total, count = 0.0, 0
    length = blocks.shape[1]
    fresh = length - 1 if stride is None else min(stride, length - 1)
    with torch.inference_mode():
        for start in tqdm(range(0, len(blocks), batch_size), desc="perplexity", leave=False, disable=None):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            # Row by row: 32-bit logits of a whole batch would take gigabytes for a large vocabulary.
            for row, (tokens, scores) in enumerate(zip(batch, logits, strict=True), start=start):
                scored = fresh if row else length - 1
                losses = torch.nn.functional.cross_entropy(
                    scores[-1 - scored : -1].float(), tokens[-scored:], reduction="sum"
                )
                total += losses.item()
                count += scored
    mean = total / count
    return math.inf if mean > 700 else math.exp(mean)
