"""Peak memory and time of pruning a random model with Llama-2-7B's shapes on a GPU, by this project or by modelopt.

    python -m benchmarks.gpu.pruning --arm balanced --output balanced.json
    python -m benchmarks.gpu.pruning --arm modelopt --output modelopt.json

Neither memory nor time depends on the values of the weights, so they are random and nothing is downloaded. One process
measures one arm, so that the memory of one arm is never counted with another's. `--layers` takes a few of the 32
decoder layers: our peak does not depend on their number; modelopt's grows with it, because the model and all Hessians
are on the GPU. Both times are proportional to it, except for the embeddings and the head. check.sh runs all arms and
compares them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.arms import prune
from benchmarks.machine import check_output, describe_machine
from sparsity.devices import peak_memory_mib, resolve_device
from sparsity.files import save_json
from sparsity.models import load_tokenizer
from sparsity.pattern import Pattern
from utils import Parser, check_at_least, run_cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARMS = ("balanced", "fast", "modelopt")
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 256}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.gpu.pruning")
    parser.add_argument("--arm", choices=ARMS, default="balanced", help="quality of hf_pts.py, or modelopt's SparseGPT")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; Llama-2-7B has 32")
    parser.add_argument("--calib_size", type=int, default=128, help="calibration sequences of random tokens")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences per forward pass")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="a model 64 wide instead of Llama-2-7B's shapes")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the figures")
    parser.add_argument("--save_model", type=Path, metavar="DIR", help="write the random model there and do not prune")
    parser.add_argument("--tokenizer", metavar="DIR", help="with --save_model: a tokenizer to save with the model")
    args = parser.parse_args()
    check_at_least(args, 1, "layers", "calib_size", "length", "batch_size")
    check_output(args.output)
    return args


def random_llama(shape: dict[str, int], layers: int, device: torch.device, home: torch.device) -> PreTrainedModel:
    """A Llama in fp16 with random weights.

    Args:
        shape: options of LlamaConfig.
        layers: number of decoder layers.
        device: where the weights are drawn, one module at a time; a GPU does it fast.
        home: where the model is kept.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(home)  # its frequencies are computed, not filled
    for module in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        module.to_empty(device=device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
        module.to(home)
    return model


def measure(args: argparse.Namespace, shape: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Prune with one arm.

    Returns:
        seconds of the pruning alone, and the peak bytes on the GPU; on the CPU, which is only for a rehearsal, the
        peak of the process with all its libraries.

    Raises:
        RuntimeError: a linear layer is not 2:4 afterwards, so that the time means nothing.
    """
    if args.arm == "modelopt":
        import modelopt.torch.sparsity  # noqa: F401  its import is not part of the pruning
    torch.manual_seed(0)
    tokens = torch.randint(shape["vocab_size"], (args.calib_size, args.length))
    model = random_llama(shape, args.layers, device, device if args.arm == "modelopt" else torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prune(args.arm, model, list(tokens.split(args.batch_size)), device, Path(folder))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear) and not Pattern().fits(module.weight.detach()):
                raise RuntimeError(f"layers.{name} is not 2:4 after pruning")
    return {
        "arm": args.arm,
        "layers": args.layers,
        "calibration": [args.calib_size, args.length],
        "machine": describe_machine(device),
        "seconds": seconds,
        "peak_bytes": round(peak_memory_mib(device) * 2**20),
    }


def main() -> None:
    args = parse_args()
    shape, device = dict(TINY if args.tiny else LLAMA_2_7B), resolve_device(args.device)
    if args.save_model:
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
            shape["vocab_size"] = len(tokenizer)
            tokenizer.save_pretrained(args.save_model)
        random_llama(shape, args.layers, device, torch.device("cpu")).save_pretrained(args.save_model)
        return
    result = measure(args, shape, device)
    print(result)
    if args.output:
        save_json(result, args.output)


if __name__ == "__main__":
    run_cli(main)
