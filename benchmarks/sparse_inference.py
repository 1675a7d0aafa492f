"""Dense against 2:4 sparse matrix products and generation on a CUDA GPU, for the shapes of a given model.

    python benchmarks/sparse_inference.py --model_dir exported_model --output benchmarks/sparse_results.json

For every shape of linear layer and every number of tokens, times `F.linear` with the dense weight and with the weight
compressed for torch's semi-structured kernels (CUTLASS and cuSPARSELt, where this GPU and build have them), after
checking that both give the same result. Then the whole model: prefill (time to process a prompt) and decode (time per
new token), both ways. Weights that are not 2:4 yet are pruned by magnitude first: times do not depend on the values.
Without a GPU of compute capability 8.0 or higher there is nothing to measure, and the script says so and ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import describe_machine, settings  # noqa: E402

import model_io  # noqa: E402
import utils  # noqa: E402
from sparsity_check import is_2_4, kernel_support  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compress = Callable[[torch.Tensor], torch.Tensor]
# Sums of thousands of half-precision products taken in another order differ by a few units of the last place.
RELATIVE_TOLERANCE = 2e-2


def why_not(device_name: str) -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device_name)
    if major < 8:
        return (
            f"{torch.cuda.get_device_name(device_name)} has compute capability {major}.{minor}, sparse kernels need 8.0"
        )
    return None


def backends() -> dict[str, Compress]:
    """Compression functions of the semi-structured backends, by name."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    return {
        "cutlass": SparseSemiStructuredTensorCUTLASS.from_dense,
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT.from_dense,
    }


def prune_by_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four consecutive values of a row; weight [rows, columns], columns % 4 == 0."""
    groups = weight.view(weight.shape[0], -1, 4)
    smallest = groups.abs().argsort(dim=-1)[..., :2]
    return groups.scatter(-1, smallest, 0).view_as(weight)


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Linear layers of the decoder; the output head stays dense."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 4 == 0
    }


def milliseconds(statement: Callable[[], Any], seconds: float) -> float:
    """Median time of a call, on CUDA with synchronization."""
    from torch.utils.benchmark import Timer

    return 1e3 * Timer("statement()", globals={"statement": statement}).blocked_autorange(min_run_time=seconds).median


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in 32-bit floats."""
    return ((result.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-12)).item()


def time_products(weight: torch.Tensor, tokens: list[int], compress: dict[str, Compress], seconds: float) -> list[dict]:
    """Dense and sparse times of x @ weight.T for x [tokens, columns]; one dict per number of tokens."""
    rows, columns = weight.shape
    packed = {}
    for name, function in compress.items():
        try:
            packed[name] = function(weight)
        except (RuntimeError, NotImplementedError) as failure:
            print(f"  {name} does not take {rows}x{columns} here: {utils.first_line(failure)}")
    results = []
    for count in tokens:
        x = torch.randn(count, columns, device=weight.device, dtype=weight.dtype)
        reference = F.linear(x, weight)
        row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": count}
        row["dense_ms"] = milliseconds(partial(F.linear, x, weight), seconds)
        for name, sparse in packed.items():
            try:
                error = relative_error(F.linear(x, sparse), reference)
                row[f"{name}_ms"] = milliseconds(partial(F.linear, x, sparse), seconds)
            except (RuntimeError, NotImplementedError) as failure:
                print(f"  {name} cannot multiply {count} tokens here: {utils.first_line(failure)}")
                continue
            row[f"{name}_error"] = error
            if error > RELATIVE_TOLERANCE:
                raise utils.UserError(f"{name} is wrong for {rows}x{columns}, {count} tokens: error {error:.3g}")
        results.append(row)
        times = "  ".join(
            f"{name} {row[f'{name}_ms']:8.4f} ms ({row['dense_ms'] / row[f'{name}_ms']:.2f}x)"
            for name in packed
            if f"{name}_ms" in row
        )
        print(f"  {rows:>6}x{columns:<6} {count:>5} tokens  dense {row['dense_ms']:8.4f} ms  {times}", flush=True)
    return results


def time_model(model: PreTrainedModel, batch_sizes: list[int], prompt: int, new: int, seconds: float) -> list[dict]:
    """Prefill time and decode time per step of a whole model, for each batch size."""
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
    """Replace the weights of all layers the backend takes by compressed ones; returns how many it took."""
    count = 0
    for layer in linear_layers(model).values():
        try:
            layer.weight = torch.nn.Parameter(compress(layer.weight.detach()), requires_grad=False)
            count += 1
        except (RuntimeError, NotImplementedError):
            continue
    return count


def compare_models(
    model: PreTrainedModel, name: str, compress: Compress, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time the model dense and compressed (in that order: compression is in place), checking the logits."""
    setting = (arguments.batch_sizes, arguments.prompt, arguments.new_tokens, arguments.seconds)
    ids = torch.arange(64, device=model.device).view(1, 64)
    with torch.inference_mode():
        reference = model(ids).logits
    dense = time_model(model, *setting)
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    layers = compress_model(model, compress)
    after = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with torch.inference_mode():
        error = relative_error(model(ids).logits, reference)
    sparse = time_model(model, *setting)
    memory = f"{before / 2**20:.0f} to {after / 2**20:.0f} MiB"
    print(f"\nwhole model, {name} in {layers} layers; logits differ by {error:.2e}; memory from {memory}")
    for left, right in zip(dense, sparse, strict=True):
        for phase in ("prefill", "decode"):
            old, new = left[f"{phase}_ms"], right[f"{phase}_ms"]
            print(f"  batch {left['batch']:>4} {phase:<8} dense {old:9.3f} ms  sparse {new:9.3f} ms  {old / new:.2f}x")
    facts = {"backend": name, "layers": layers, "logits_error": error, "memory_bytes": [before, after]}
    return {**facts, "dense": dense, "sparse": sparse}


def print_verdict(products: list[dict]) -> None:
    """Say for which numbers of tokens 2:4 is faster, and where it is not."""
    print("\nwhere 2:4 helps (best backend, median over shapes):")
    for count in sorted({row["tokens"] for row in products}):
        ratios = sorted(
            row["dense_ms"] / min(value for key, value in row.items() if key.endswith("_ms") and key != "dense_ms")
            for row in products
            if row["tokens"] == count and any(key.endswith("_ms") and key != "dense_ms" for key in row)
        )
        if ratios:
            middle = ratios[len(ratios) // 2]
            print(f"  {count:>5} tokens at a time: {middle:.2f}x, {'faster' if middle > 1.03 else 'does NOT help'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default=str(ROOT / "demo/SmolLM2-135M-Instruct"), help="dense or exported model")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048, 8192], help="rows of the input")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64], help="of the whole model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens to decode (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on one figure (default %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the figures")
    arguments = parser.parse_args()
    reason = why_not(arguments.device)
    if reason:
        print(f"nothing to measure: {reason}. 2:4 kernels exist only for NVIDIA GPUs from Ampere on; elsewhere a 2:4")
        print("model runs exactly as fast as a dense one.")
        return
    device = model_io.resolve_device(arguments.device)
    model = model_io.load_model(arguments.model_dir, model_io.DTYPES[arguments.dtype]).to(device)
    print(f"{describe_machine(device)}; {arguments.dtype}")
    shapes: dict[tuple[int, ...], torch.Tensor] = {}
    for layer in linear_layers(model).values():
        if not is_2_4(layer.weight):
            layer.weight.data = prune_by_magnitude(layer.weight.data)
        shapes.setdefault(tuple(layer.weight.shape), layer.weight.data)
    products: list[dict] = []
    with torch.inference_mode():
        for (rows, columns), weight in shapes.items():
            allowed = ", ".join(kernel_support(rows, columns, weight.dtype)) or "none"
            print(f"{rows}x{columns}: shape allowed for {allowed}")
            products += time_products(weight, arguments.tokens, backends(), arguments.seconds)
    print_verdict(products)
    del model, shapes
    usable = {name for row in products for name in backends() if f"{name}_ms" in row}
    models = []
    for name in sorted(usable):
        fresh = model_io.load_model(arguments.model_dir, model_io.DTYPES[arguments.dtype]).to(device)
        for layer in linear_layers(fresh).values():
            layer.weight.data = layer.weight.data if is_2_4(layer.weight) else prune_by_magnitude(layer.weight.data)
        models.append(compare_models(fresh, name, backends()[name], arguments))
    if arguments.output:
        figures = {"machine": describe_machine(device), "products": products, "models": models}
        utils.save_json({**figures, "arguments": settings(arguments)}, arguments.output)


if __name__ == "__main__":
    utils.run_cli(main)
