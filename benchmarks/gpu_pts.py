"""Peak memory and time of pruning a random model of Llama-2-7B's shape on a GPU, by our engine or by modelopt's.

    python benchmarks/gpu_pts.py --arm balanced --output balanced.json
    python benchmarks/gpu_pts.py --arm modelopt --output modelopt.json

Neither memory nor time depends on what the weights are, so that they are random and nothing is downloaded. One process
measures one arm, so that no arm's memory is counted with another's. `--layers` takes a few of the 32 decoder layers:
our peak does not depend on their number, modelopt's grows with it (the model and all Hessians lie on the GPU), and
both times are proportional to it but for the embeddings and the head. `gpu_check.sh` runs all arms and compares them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arms import prune  # noqa: E402
from machine import describe_machine  # noqa: E402

import model_io  # noqa: E402
import utils  # noqa: E402
from processes import peak_memory_mib  # noqa: E402
from sparsity_check import is_2_4  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARMS = ("balanced", "fast", "modelopt")
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 256}


def random_llama(shape: dict[str, int], layers: int, device: torch.device, home: torch.device) -> PreTrainedModel:
    """A Llama in fp16, its weights drawn on `device` one module after another (fast on a GPU) and kept on `home`."""
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


def measure(arguments: argparse.Namespace, shape: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Prune with one arm. Seconds are those of the pruning alone; bytes are the peak on the GPU.

    On the CPU, which only a rehearsal uses, bytes are those of the process, libraries included.

    Raises:
        UserError: our engine ran out of GPU memory. (modelopt doing so is a result.)
    """
    if arguments.arm == "modelopt":
        import modelopt.torch.sparsity  # noqa: F401  its import is not part of the pruning
    torch.manual_seed(0)
    tokens = torch.randint(shape["vocab_size"], (arguments.calib_size, arguments.length))
    result: dict[str, Any] = {"arm": arguments.arm, "layers": arguments.layers, "machine": describe_machine(device)}
    result["calibration"] = [arguments.calib_size, arguments.length]
    try:
        model = random_llama(
            shape, arguments.layers, device, device if arguments.arm == "modelopt" else torch.device("cpu")
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            prune(arguments.arm, model, list(tokens.split(arguments.batch_size)), device, Path(folder))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            result["seconds"] = time.perf_counter() - started
            result["peak_bytes"] = round(peak_memory_mib(device) * 2**20)
            if device.type == "cuda":
                result["reserved_bytes"] = torch.cuda.max_memory_reserved(device)  # with what the allocator holds back
            check(model)
    except torch.OutOfMemoryError as error:
        if arguments.arm != "modelopt":
            raise utils.UserError(f"{arguments.arm} ran out of GPU memory: {utils.first_line(error)}") from error
        result["out_of_memory"] = utils.first_line(error)
    return result


def check(model: PreTrainedModel) -> None:
    """Raises RuntimeError if a linear layer of the decoder is not 2:4, for then the time is worth nothing."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear) and not is_2_4(module.weight.detach()):
            raise RuntimeError(f"layers.{name} is not 2:4 after pruning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, default="balanced", help="quality of hf_pts.py, or modelopt's SparseGPT")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, 32 for all (default %(default)s)")
    parser.add_argument("--calib_size", type=int, default=128, help="sequences of random tokens (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences per forward pass (default %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="a model 64 wide in place of Llama-2-7B's shape")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the figures")
    parser.add_argument("--save_model", type=Path, metavar="DIR", help="write the random model there, prune nothing")
    parser.add_argument("--tokenizer", metavar="DIR", help="with --save_model: a tokenizer to go with the model")
    arguments = parser.parse_args()
    for name in ("layers", "calib_size", "length", "batch_size"):
        if getattr(arguments, name) < 1:
            raise utils.UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    shape, device = dict(TINY if arguments.tiny else LLAMA_2_7B), model_io.resolve_device(arguments.device)
    if arguments.save_model:
        if arguments.tokenizer:
            tokenizer = model_io.load_tokenizer(arguments.tokenizer)
            shape["vocab_size"] = len(tokenizer)
            tokenizer.save_pretrained(arguments.save_model)
        random_llama(shape, arguments.layers, device, torch.device("cpu")).save_pretrained(arguments.save_model)
        return
    result = measure(arguments, shape, device)
    print(result)
    if arguments.output:
        utils.save_json(result, arguments.output)


if __name__ == "__main__":
    utils.run_cli(main)
