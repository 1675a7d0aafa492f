"""The small files of a model folder: settings, tokenizer, licence and model code, copied from the dense model."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import reported_as
from sparsity.files import read_json, save_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The files of a model folder other than its weights.
COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("*processor_config.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
    *("*.py", "LICENSE*", "NOTICE*"),
)


def source_folder(model: str) -> Path:
    """The folder of the dense model's small files; for a hub id they are fetched, or taken from the cache.

    Raises:
        UserError: the hub cannot be reached and the files are not in the cache.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    with reported_as(f"cannot fetch the tokenizer and settings of '{model}'", OSError, ValueError):
        return Path(snapshot_download(model, allow_patterns=list(COMPANIONS)))


def write_companions(
    source: Path, model_config: PretrainedConfig, dtype: str, folder: Path, quantization: dict[str, Any] | None = None
) -> None:
    """Copy tokenizer, settings, licence and model code as they are, which opens in more programs than a re-saved set.

    Changed are only: the dtype, leftovers of compression tools, and what transformers 5 writes in a way that
    transformers 4 takes for something else. `quantization` becomes the configuration's quantization_config.
    """
    from transformers import GenerationConfig

    for path in source.iterdir():
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, folder / path.name)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(model_config).save_pretrained(folder)
    config = read_json(folder / "config.json", "model configuration")
    for key in ("sparsity_config", "compression_config", "_name_or_path"):
        config.pop(key, None)
    if quantization is not None:
        config["quantization_config"] = quantization
    for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = dtype
    # The state may have more tokens than the dense model; see modelopt_state.fit_vocabulary.
    sizes = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    if not model_config.tie_word_embeddings:  # whatever the source's says; see models.load_structure
        config["tie_word_embeddings"] = sizes["tie_word_embeddings"] = False
    if "vocab_size" in sizes:
        sizes["vocab_size"] = max(sizes["vocab_size"], model_config.get_text_config().vocab_size)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 4 would use a rope_theta of 10000
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    save_json(config, folder / "config.json")
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = read_json(folder / "tokenizer_config.json", "tokenizer configuration")
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5 only
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        save_json(tokenizer, folder / "tokenizer_config.json")
