"""Dense models and tokenizers: loaded with one clear line for what is wrong with them; decoder layers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity.errors import UserError, first_line
from sparsity.distributed import warn
from sparsity.quantized import quantization_algorithm, read_dequantized, round_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Fields of a configuration that only models with rotary embeddings or ALiBi fill: transformers 5 has the first, which
# is None elsewhere, transformers 4 the others.
ROTARY_FIELDS = ("rope_parameters", "rope_theta", "rotary_emb_base", "alibi")


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

    Rotary models compute the angles of any position, so more tokens than they were trained on are possible, though of
    unknown quality: that is a warning. ALiBi has no bound. A learned position table ends, and so do the tables that
    GPT-J and MPT compute once.

    Raises:
        UserError: more tokens than a table of positions holds.
    """
    text_config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(text_config, key, None)
        if not isinstance(positions, int) or sum(lengths.values()) <= positions:
            continue
        asked = " plus ".join(f"{name} {value}" for name, value in lengths.items())
        if not any(getattr(text_config, name, None) for name in ROTARY_FIELDS):
            raise UserError(f"{asked} is more than the model's {positions} positions; choose a smaller value")
        if not getattr(text_config, "alibi", False):
            warn(
                f"{asked} is more than the {positions} positions that the model was trained with; its quality may drop"
            )
        return


def load_model(
    model: str,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    quantized: bool = False,
    placing: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal LM on the CPU in eval mode; `dtype` "auto" keeps the checkpoint's own.

    Args:
        quantized: accept a model that modelopt quantized, for evaluation only; see `sparsity.quantized`.
        placing: arguments of `from_pretrained` that put the weights elsewhere; see `sparsity.placement`.

    Raises:
        UserError: the model cannot be found, its weight files are missing, truncated or misshapen, or it is quantized.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    if quantized and (algorithm := quantization_algorithm(config, model)):
        return _load_quantized(model, config, algorithm, dtype, trust_remote_code)
    _refuse_quantized(config, model)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "low_cpu_mem_usage": True, **(placing or {})}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, config=config, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load the weights of '{model}': {first_line(error)}") from error
    return loaded.eval()


def _refuse_quantized(config: PretrainedConfig, model: str) -> None:
    if algorithm := quantization_algorithm(config, model):
        raise UserError(f"'{model}' is quantized ({algorithm}); give the unquantized model that it was made from")


def _load_quantized(
    model: str, config: PretrainedConfig, algorithm: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    if not Path(model).is_dir():
        raise UserError(f"'{model}' is quantized ({algorithm}) and on the hub; download it and give its folder")
    del config.quantization_config  # transformers would look for a program that opens it
    wanted = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    tensors, scales = read_dequantized(Path(model), wanted)
    create: Any = type(empty_model(config, wanted, trust_remote_code)).from_pretrained
    try:
        loaded = create(None, config=config, state_dict=tensors, dtype=wanted)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the weights of '{model}': {first_line(error)}") from error
    round_inputs(loaded, scales, algorithm)
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


def model_without_weights(
    model: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM in eval mode whose parameters are on the meta device, for weights that come from elsewhere.

    Buffers are on the CPU with their values: those that no checkpoint holds, such as rotary frequencies, are complete.

    Raises:
        UserError: the model cannot be found, or is quantized.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    _refuse_quantized(config, model)
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    empty.tie_weights()  # registering a parameter on the meta device makes a new one of it, also where it was shared
    return empty.eval()


def few_values(weight: torch.Tensor) -> list:
    """About sixteen values spread over a weight, which distinguish checkpoints without reading all of them."""
    return weight.flatten()[:: max(1, weight.numel() // 16)].tolist()


def cache_name(output: Mapping[str, Any]) -> str:
    """Under which name the installed transformers returns and takes the cache of keys and values."""
    return "cache" if "cache" in output else "past_key_values"


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


def head_counts(config: PretrainedConfig) -> tuple[int, int, int]:
    """Attention heads of queries; of keys and values; channels of each."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, width


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest ModuleList of config.num_hidden_layers equal modules."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        raise UserError(
            f"found no list of {count} decoder layers in {type(model).__name__}; this architecture is not supported"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
