"""Dense and 2:4 sparse matrix products and generation on a CUDA GPU, compared for the shapes of a given model.

    python -m benchmarks.sparse_inference --model_dir exported_model

For every shape of linear layer and every number of tokens, this times `F.linear` with the dense weight and with the
weight compressed for torch's semi-structured kernels (CUTLASS and cuSPARSELt, where this GPU and build have them),
after checking that both give the same result. Then it times the whole model both ways: prefill (time to process a
prompt) and decode (time per new token). Weights that are not 2:4 are first pruned by magnitude, since times do not
depend on the values. Without a GPU of compute capability 8.0 or higher there is nothing to measure; the script says so
and ends.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from benchmarks.machine import add_output_option, check_output, describe_machine, save_figures
from sparsity.devices import resolve_device, torch_dtype
from sparsity.errors import UserError, first_line
from sparsity.models import load_model
from sparsity.pattern import Pattern
from sparsity.pts.recipe import score_mask
from utils import Parser, check_at_least, run_cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compress = Callable[[torch.Tensor], torch.Tensor]
# Sums of thousands of 16-bit products in another order differ by a few units of the last place.
RELATIVE_TOLERANCE = 2e-2


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.sparse_inference")
    parser.add_argument("--model_dir", default="demo/SmolLM2-135M-Instruct", help="dense or exported model")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16", help="precision of the weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048, 8192], help="rows of the input")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64], help="prompts, for the whole model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds to spend on one figure")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    add_output_option(parser, "sparse_inference")
    args = parser.parse_args()
    check_at_least(args, 1, "prompt", "new_tokens")
    if min(*args.tokens, *args.batch_sizes) < 1:
        raise UserError(f"--tokens and --batch_sizes must be at least 1, got {args.tokens} and {args.batch_sizes}")
    return args


def why_not(device_name: str) -> str | None:
    """The reason why nothing can be measured on this device, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.cuda.get_device_capability(resolve_device(device_name)) < (8, 0):
        return "sparse kernels need a GPU of compute capability 8.0"
    return None


def backends() -> dict[str, Compress]:
    """Compression functions of the semi-structured backends, by name."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    return {
        "cutlass": SparseSemiStructuredTensorCUTLASS.from_dense,
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT.from_dense,
    }


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Linear layers of the decoder by name; the output head stays dense."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 4 == 0
    }


def load_2_4(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model on the device, each linear layer of its decoder 2:4."""
    model = load_model(args.model_dir, torch_dtype(args.dtype)).to(device)
    for layer in linear_layers(model).values():
        if not Pattern().fits(layer.weight):
            layer.weight.data = layer.weight.data.masked_fill(~score_mask(layer.weight.data.abs(), Pattern(2, 4)), 0)
    return model


def milliseconds(statement: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a call, on CUDA with synchronization, measured for `seconds`."""
    from torch.utils.benchmark import Timer

    return 1e3 * Timer("statement()", globals={"statement": statement}).blocked_autorange(min_run_time=seconds).median


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in 32-bit floats."""
    return ((result.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-12)).item()


def time_products(weight: torch.Tensor, tokens: list[int], compress: dict[str, Compress], seconds: float) -> list[dict]:
    """Dense and sparse times of x @ weight.T for x [tokens, columns] and a 2:4 weight [rows, columns].

    Returns:
        for each number of tokens, a dict of the shape, milliseconds and relative errors.

    Raises:
        UserError: a sparse kernel gives a wrong result.
    """
    rows, columns = weight.shape
    packed = {}
    for name, function in compress.items():
        try:
            packed[name] = function(weight)
        except (RuntimeError, NotImplementedError) as failure:
            print(f"  {name} does not take {rows}x{columns} here: {first_line(failure)}")
    results = []
    for count in tokens:
        x = torch.randn(count, columns, device=weight.device, dtype=weight.dtype)
        reference = F.linear(x, weight)
        row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": count}
        row["dense_ms"] = milliseconds(partial(F.linear, x, weight), seconds)
        for name, sparse in packed.items():
            row[f"{name}_error"] = error = relative_error(F.linear(x, sparse), reference)
            row[f"{name}_ms"] = milliseconds(partial(F.linear, x, sparse), seconds)
            if error > RELATIVE_TOLERANCE:
                raise UserError(f"{name} is wrong for {rows}x{columns}, {count} tokens: error {error:.3g}")
        results.append(row)
        times = "  ".join(
            f"{name} {row[f'{name}_ms']:8.4f} ms ({row['dense_ms'] / row[f'{name}_ms']:.2f}x)" for name in packed
        )
        print(f"  {rows:>6}x{columns:<6} {count:>5} tokens  dense {row['dense_ms']:8.4f} ms  {times}", flush=True)
    return results


def time_model(model: PreTrainedModel, batch_sizes: list[int], prompt: int, new: int, seconds: float) -> list[dict]:
    """Prefill time and decode time per step of a whole model, in milliseconds, for each batch size."""
    results = []
    vocabulary = model.config.get_text_config().vocab_size
    for batch in batch_sizes:
        ids = torch.randint(vocabulary, (batch, prompt), device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

        def generate(count: int, ids: torch.Tensor = ids, options: dict[str, Any] = options) -> None:
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)

        with torch.inference_mode():
            prefill = milliseconds(partial(model, ids, logits_to_keep=1), seconds)
            one, many = milliseconds(lambda: generate(1), seconds), milliseconds(lambda: generate(1 + new), seconds)
        results.append({"batch": batch, "prefill_ms": prefill, "decode_ms": (many - one) / new})
    return results


def compress_model(model: PreTrainedModel, compress: Compress) -> int:
    """Compress the weights of all layers that the backend supports; returns how many it compressed."""
    count = 0
    for layer in linear_layers(model).values():
        with contextlib.suppress(RuntimeError, NotImplementedError):
            layer.weight = torch.nn.Parameter(compress(layer.weight.detach()), requires_grad=False)
            count += 1
    return count


def compare_models(model: PreTrainedModel, name: str, compress: Compress, args: argparse.Namespace) -> dict[str, Any]:
    """Time the model dense and then compressed (in place), and report how far the logits differ."""
    setting = (args.batch_sizes, args.prompt, args.new_tokens, args.seconds)
    ids = torch.arange(64, device=model.device).view(1, 64)
    with torch.inference_mode():
        reference = model(ids).logits
    dense = time_model(model, *setting)
    layers = compress_model(model, compress)
    with torch.inference_mode():
        error = relative_error(model(ids).logits, reference)
    sparse = time_model(model, *setting)
    print(f"\nwhole model, {name} in {layers} layers; logits differ by {error:.2e}")
    for left, right in zip(dense, sparse, strict=True):
        for phase in ("prefill", "decode"):
            old, new = left[f"{phase}_ms"], right[f"{phase}_ms"]
            print(f"  batch {left['batch']:>4} {phase:<8} dense {old:9.3f} ms  sparse {new:9.3f} ms  {old / new:.2f}x")
    return {"backend": name, "layers": layers, "logits_error": error, "dense": dense, "sparse": sparse}


def print_verdict(products: list[dict]) -> None:
    """Print for which numbers of tokens 2:4 is faster, and for which it is not."""
    print("\nwhere 2:4 is faster (best backend, median over shapes):")
    speedups: dict[int, list[float]] = {}
    for row in products:
        sparse = [value for key, value in row.items() if key.endswith("_ms") and key != "dense_ms"]
        if sparse:
            speedups.setdefault(row["tokens"], []).append(row["dense_ms"] / min(sparse))
    for count, ratios in sorted(speedups.items()):
        middle = sorted(ratios)[len(ratios) // 2]
        print(f"  {count:>5} tokens at a time: {middle:.2f}x, {'faster' if middle > 1.03 else 'NOT faster'}")


def compare_products(model: PreTrainedModel, args: argparse.Namespace) -> list[dict]:
    """Time the products of every shape of linear layer in the model."""
    weights = {tuple(layer.weight.shape): layer.weight.data for layer in linear_layers(model).values()}
    products: list[dict] = []
    with torch.inference_mode():
        for weight in weights.values():
            products += time_products(weight, args.tokens, backends(), args.seconds)
    return products


def main() -> None:
    args = parse_args()
    reason = why_not(args.device)
    if reason:
        print(f"nothing to measure: {reason}. 2:4 kernels exist only for NVIDIA GPUs from Ampere on; elsewhere a 2:4")
        print("model runs exactly as fast as a dense one.")
        return
    check_output(args.output)
    device = resolve_device(args.device)
    print(f"{describe_machine(device)}; {args.dtype}")
    products = compare_products(load_2_4(args, device), args)
    print_verdict(products)
    usable = [name for name in backends() if any(f"{name}_ms" in row for row in products)]
    models = [compare_models(load_2_4(args, device), name, backends()[name], args) for name in usable]
    save_figures({"products": products, "models": models}, args, device)


if __name__ == "__main__":
    run_cli(main)
