"""Dense models and tokenizers: loaded with one clear line for what is wrong with them; decoder layers."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity.errors import UserError, few, memory_shortage, reported_as, warn, warn_once, with_downloads
from sparsity.files import open_safetensors, safetensors_files
from sparsity.quantized import quantization_algorithm, read_dequantized, round_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Configuration fields that only models with rotary embeddings or ALiBi set: the first in transformers 5, the others in
# transformers 4.
ROTARY_FIELDS = ("rope_parameters", "rope_theta", "rotary_emb_base", "alibi")
# Configuration fields of training, generation and sizes that may grow: they change nothing about a state's weights.
NO_EFFECT = re.compile(
    r"^_|^tie_|dropout|initializer|aux_loss|output_|vocab_size|max_pos|cache|token_i|kernels|pretraining_tp"
)
# Names of what quantizers store beside or in place of a weight.
QUANTIZED = re.compile(
    r"weight_scale|scale_inv|\.scales?$|input_scale|qweight|qzeros|weight_packed|absmax|\.SCB$|_blocks$"
)
FLOATS = ("BF16", "F16", "F32", "F64")


def load_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a hub id or folder and check that it is a decoder-only language model.

    Raises:
        UserError: not found, unreadable, or an encoder or encoder-decoder model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", "."))):
        raise UserError(f"model folder {model} does not exist; give a Hugging Face model folder or hub id")
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model folder {model} has no config.json; give a Hugging Face model folder or hub id")
    # The last two errors: JSON of a wrong shape.
    with reported_as(f"cannot load a model from '{model}'", OSError, ValueError, KeyError, TypeError, AttributeError):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    architectures = config.architectures or []
    auto_classes = getattr(config, "auto_map", {})  # of code that comes with a checkpoint
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in auto_classes
    heads = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    has_head = not architectures or any(name.endswith(heads) for name in architectures)
    if config.is_encoder_decoder or not is_causal or not has_head:
        kind = architectures[0] if architectures else config.model_type
        raise UserError(f"'{model}' is a {kind}, not a decoder-only causal language model such as Llama")
    return config


def check_lengths(config: PretrainedConfig, lengths: dict[str, int]) -> None:
    """Check that token counts, by option, together stay within the model's positions.

    Rotary models can compute any position, with unknown quality beyond those they were trained on: that is a warning.
    ALiBi has no limit. A learned position table has, and so have the tables that GPT-J and MPT compute once.

    Raises:
        UserError: more tokens than a table of positions holds.
    """
    fields = text_fields(config)
    keys = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((fields[key] for key in keys if isinstance(fields.get(key), int)), None)
    if positions is None or sum(lengths.values()) <= positions:
        return
    given = " plus ".join(f"{name} {value}" for name, value in lengths.items())
    if not any(fields.get(name) for name in ROTARY_FIELDS):
        raise UserError(f"{given} is more than the model's {positions} positions; choose a smaller value")
    if not fields.get("alibi"):
        warn(f"{given} is more than the {positions} positions that the model was trained with; its quality may drop")


def load_model(
    model: str,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    quantized: bool = False,
    placing: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal LM in eval mode, by default on the CPU.

    Args:
        dtype: "auto" keeps the checkpoint's own.
        quantized: accept a model that modelopt quantized, for evaluation only; see `sparsity.quantized`.
        placing: arguments of `from_pretrained` that put the weights elsewhere; see `sparsity.placement`.

    Raises:
        UserError: not found, weight files that are missing, truncated or misshapen, tensors that are missing or not
            finite, or a quantized model.
    """
    from safetensors import SafetensorError

    config = load_config(model, trust_remote_code)
    if quantized and (algorithm := quantization_algorithm(config, model)):
        return _load_quantized(model, config, algorithm, dtype, trust_remote_code)
    if not quantized:
        refuse_quantized(config, model)
    if Path(model).is_dir() and not quantization_settings(config):
        stored_tensors(model)  # names what is wrong with a file
    report_log = logging.getLogger("transformers.modeling_utils")
    # The filter must see the report, whatever is shown. At WARNING itself, transformers warns of what is not sharded.
    report_log.setLevel(logging.WARNING - 1)
    report_log.addFilter(_without_report)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "low_cpu_mem_usage": True, **(placing or {})}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are in the report
    errors = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError)
    pickled = f"'{model}' has a .bin file with code in it, which is not run; save the model with save_pretrained"
    with reported_as(f"cannot load the weights of '{model}'", *errors), reported_as(pickled, pickle.UnpicklingError):
        loaded, report = with_downloads(_from_pretrained, model, config=config, **options)
    check_complete(loaded, model, report)
    if not placing:
        check_finite(loaded, model)
    return loaded.eval()


def _from_pretrained(model: str, **options: Any) -> Any:
    """Load with a hub's own answer where it refuses the only weight file, which transformers reports as missing."""
    from huggingface_hub import hf_hub_download
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(model, **options)
    except OSError as error:
        if Path(model).is_dir() or "does not appear to have a file" not in str(error):
            raise
    hf_hub_download(model, "model.safetensors")  # raises what the server answers
    return AutoModelForCausalLM.from_pretrained(model, **options)


def _without_report(record: logging.LogRecord) -> bool:
    """Drop transformers' table of missing and unexpected tensors, which `check_complete` reports, from the log.

    Raises:
        ValueError: it names tensors that cannot be put together, such as those of a mixture that lacks an expert's.
    """
    text = record.getMessage()
    if failed := "LOAD REPORT" in text and re.search(r"destined for (\S+)\.", text):
        raise ValueError(f"parts of {failed[1]} are missing or of other shapes")
    return "LOAD REPORT" not in text


def check_complete(loaded: PreTrainedModel, model: str, report: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the tensors of the model that its config.json describes, and no quantized ones.

    transformers would give random values to missing tensors, and drop decoder layers beyond num_hidden_layers.

    Args:
        report: the loading report of `from_pretrained`. Its missing keys are without those that share memory.

    Raises:
        UserError: names a few tensors and the likely cause.
    """
    # (name, stored, own shape); of transformers 4 the name
    misshapen = dict((item, ()) if isinstance(item, str) else (item[0], item[1:]) for item in report["mismatched_keys"])
    missing = sorted({*report["missing_keys"]} - misshapen.keys())  # transformers 4 has these in both
    unexpected = sorted(report["unexpected_keys"])
    if quantized := [name for name in unexpected if QUANTIZED.search(name)]:
        raise quantized_error(model, f"it has {few(quantized)}")
    if missing:
        cause = _why_missing(missing, unexpected)
        raise UserError(f"'{model}' lacks {len(missing)} tensor(s) of the model ({few(missing)}); {cause}")
    if misshapen:
        name, shapes = min(misshapen.items())
        how = "{} in its files, {}".format(*map(list, shapes)) if shapes else "of another shape"
        raise UserError(f"'{model}': {name} is {how} by its config.json; one of the two is wrong")
    if not unexpected:
        return
    modules = dict(loaded.named_modules())
    for name in unexpected:
        if isinstance(modules.get(name.removesuffix(".bias")), nn.Linear):
            raise UserError(f"'{model}' has {name}, which the model of its config.json lacks; correct config.json")
    prefix, layers = decoder_layers(loaded)
    known = {name.partition(".")[2] for name in layers.state_dict()}
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    numbered = [match.groups() for match in map(pattern.fullmatch, unexpected) if match]
    # Layers for prediction of several tokens, which transformers leaves out of the model, have other tensors as well.
    others = {number for number, tail in numbered if tail not in known}
    if further := [number for number, _ in numbered if number not in others]:
        raise UserError(
            f"'{model}' has tensors of {prefix}.{further[0]}, which the model of its config.json with {len(layers)} "
            "layers lacks; correct num_hidden_layers"
        )
    warn_once(f"{len(unexpected)} tensor(s) of '{model}' are not part of the language model ({few(unexpected)})")


def _why_missing(missing: list[str], unexpected: list[str]) -> str:
    """The likely cause of missing tensors, from the names in the checkpoint that the model does not have."""
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "it holds a LoRA adapter: merge it (merge_and_unload) and save the model"
    added = {part for name in unexpected for part in name.split(".")}
    added -= {part for name in missing for part in name.split(".")}
    without = [".".join(part for part in name.split(".") if part not in added) for name in unexpected]
    if added and any(f".{name}".endswith(f".{wanted}") for name in without for wanted in missing[:3]):
        return f"its names have '{min(added)}.' in them: save it from the unwrapped model"
    return "its files are incomplete or of another architecture" + (f"; they have {few(unexpected)}" * bool(unexpected))


def check_finite(loaded: nn.Module, model: str) -> None:
    """Check that no weight of a model loaded from `model` is NaN or infinite, and no buffer NaN.

    Raises:
        UserError: names the first one.
    """
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.aminmax()
        if low.isnan() or (isinstance(tensor, nn.Parameter) and (low.isinf() or high.isinf())):
            cause = "the checkpoint is damaged"
            if tensor.dtype == torch.float16 and not low.isnan():
                cause = "it exceeds float16, or the checkpoint is damaged; try --dtype bf16 or fp32"
            raise UserError(f"{name} of '{model}' holds NaN or infinite values; {cause}")


def quantization_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The quantization_config of a model or of its language model; empty for weights that are not quantized."""
    return config.to_dict().get("quantization_config") or text_fields(config).get("quantization_config") or {}


def refuse_quantized(config: PretrainedConfig, model: str) -> None:
    """Check that a model has weights that can be pruned and trained.

    Raises:
        UserError: it is quantized.
    """
    if settings := quantization_settings(config):
        raise quantized_error(
            model, settings.get("quant_algo") or settings.get("quant_method") or "its config.json says so"
        )


def quantized_error(model: str, how: str) -> UserError:
    """The refusal of a quantized model, with its kind or what shows it."""
    return UserError(f"'{model}' is quantized ({how}); give the unquantized model that it was made from")


def _load_quantized(
    model: str, config: PretrainedConfig, algorithm: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    if not Path(model).is_dir():
        raise UserError(f"'{model}' is quantized ({algorithm}) and on the hub; download it and give its folder")
    del config.quantization_config  # transformers would look for a library that opens it
    target = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    tensors, scales = read_dequantized(Path(model), target)
    create: Any = type(empty_model(config, target, trust_remote_code)).from_pretrained
    with reported_as(f"cannot load the weights of '{model}'", OSError, ValueError, RuntimeError):
        loaded = create(None, config=config, state_dict=tensors, dtype=target)
    round_inputs(loaded, scales, algorithm)
    return loaded.eval()


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration on the meta device, for shapes and estimates."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Eager attention builds its masks without looking at values, which an empty model does not have.
        options = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
    if hasattr(empty, "set_experts_implementation"):  # in transformers 5; others look at values, or ask for bf16
        empty.set_experts_implementation("batched_mm")
    return empty


def load_structure(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint on the meta device, with what is tied in its files, whatever its configuration says.

    Raises:
        UserError: as `load_model`.
    """
    loaded = load_model(model, trust_remote_code=trust_remote_code, placing={"device_map": "meta"})
    if not shared_names(loaded):
        loaded.config.tie_word_embeddings = loaded.config.get_text_config(decoder=True).tie_word_embeddings = False
    return loaded


def model_without_weights(
    model: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM in eval mode with its parameters on the meta device and its buffers on the CPU.

    For weights that come from elsewhere: buffers that no checkpoint holds, such as rotary frequencies, are complete.

    Raises:
        UserError: the model cannot be found, or is quantized.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_structure(model, trust_remote_code).config
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    empty.tie_weights()  # parameters that were shared have become two on the meta device
    return empty.eval()


def shared_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one's tensor, each with that one's name (lm_head → embed_tokens)."""
    first: dict[nn.Parameter, str] = {}
    names = {name: first.setdefault(weight, name) for name, weight in model.named_parameters(remove_duplicate=False)}
    return {name: other for name, other in names.items() if name != other}


def stored_tensors(model: str) -> dict[str, Path]:
    """The tensors in a checkpoint's safetensors files: name → file; none where it has no such files.

    Raises:
        UserError: a file is missing or damaged, or holds quantized weights.
    """
    from transformers.utils import cached_file

    optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(model, "model.safetensors.index.json", **optional)
    path = index or cached_file(model, "model.safetensors", **optional)
    stored: dict[str, Path] = {}
    for file in safetensors_files(Path(path).parent) if path else ():
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no dict
                if name.endswith(".weight") and (kind := tensors.get_slice(name).get_dtype()) not in FLOATS:
                    raise quantized_error(model, f"{name} is {kind}")
                stored[name] = file
    return stored


def runs_in_bf16(model: nn.Module) -> bool:
    """Whether a float32 model on the CPU runs under autocast to bf16: DBRX and X-MOD write outputs into float32."""
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except RuntimeError as error:
        if memory_shortage(error):
            raise
        return False
    return True


def few_values(weight: torch.Tensor) -> list:
    """About sixteen values spread over a weight, to tell checkpoints apart without reading all of them."""
    return weight.flatten()[:: max(1, weight.numel() // 16)].tolist()


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a pad token that is missing, or that the model does not have, becomes end-of-text.

    Raises:
        UserError: no tokenizer, or no end-of-text token.
    """
    from transformers import AutoTokenizer

    # tokenizers raises Exception itself for a malformed tokenizer.json.
    with reported_as(f"cannot load a tokenizer from '{model}'", Exception):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{model}' has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    rows = text_fields(load_config(model, trust_remote_code)).get("vocab_size") or len(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # such as a [PAD] added to the tokenizer only
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of the language model's configuration, also under their common names (n_head: num_attention_heads).

    Where layers have values of their own (Gemma 4), reading an attribute is an error; here it has the first value.
    """
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    return fields | {name: fields[stored] for name, stored in text.attribute_map.items() if stored in fields}


def computing_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of the language model's configuration that decide what it computes, in types of JSON."""
    from transformers import PretrainedConfig

    fields, common = config.get_text_config(decoder=True).to_dict(), PretrainedConfig().to_dict()
    kept = {key: fields[key] for key in fields.keys() - common.keys() if not NO_EFFECT.search(key)}
    return json.loads(json.dumps(kept, default=str))


def head_counts(config: PretrainedConfig) -> tuple[int, int, int]:
    """Number of query heads, number of key and value heads, channels per head."""
    fields = text_fields(config)
    heads = fields.get("num_attention_heads") or 1
    width = fields.get("head_dim") or fields["hidden_size"] // heads
    return heads, fields.get("num_key_value_heads") or heads, width


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest list of modules in the text model.

    A list of config.num_hidden_layers modules goes before others.

    Raises:
        UserError: there is no such list.
    """
    from transformers import PreTrainedModel

    text = model.config.get_text_config(decoder=True)
    towers: set[nn.Module] = set()  # of vision, with configurations of their own
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) not in (type(text), type(model.config)):
            towers |= set(part.modules())
    for root in (model.get_decoder(), model):  # ModernBERT's decoder is its head
        inside = set(root.modules()) - towers
        lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m in inside]
        usual = [(name, m) for name, m in lists if len(m) == text.num_hidden_layers]  # LongCat-Flash counts twice
        if lists:
            return max(usual or lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    raise UserError(f"{type(model).__name__} has no list of decoder layers; this architecture is not supported")
