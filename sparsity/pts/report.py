"""Reports of hf_pts.py: the plan, the estimated cost and the results of a pruning run."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster, peak_memory_mib
from sparsity.errors import few
from sparsity.generated_text import sequences_at_once, writing_dtype
from sparsity.models import decoder_layers
from sparsity.pts.calibration import CalibrationSet
from sparsity.pts.experts import at_once
from sparsity.pts.layer_store import MatrixLog
from sparsity.pts.recipe import Recipe
from sparsity.pts.structure import choose_weights, observe
from sparsity.sources import SELF, shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIB = 2**20
# Sustained multiplications and additions a second, all else included, of a laptop's cores and of an H100.
FLOPS = {"cpu": 1.5e11, "cuda": 5e13}
BF16_GAIN = 1.5  # on a CPU with bf16 instructions, where forward passes and statistics use them
BANDWIDTH = {"cpu": 8e9, "cuda": 1.5e12}  # sustained bytes a second from memory


def error_table(rows: list[MatrixLog]) -> str:
    """A table with a row per kind of linear layer (q_proj, …): count, sparsity, relative error, seconds."""
    kinds: dict[str, list[MatrixLog]] = {}
    for row in rows:
        kinds.setdefault(row.name.rsplit(".", 1)[-1], []).append(row)
    header = ("layer", "count", "shape", "sparsity", "mean error", "max error", "seconds")
    lines = ["{:<16}{:>6}{:>14}{:>10}{:>12}{:>11}{:>9}".format(*header)]
    for kind, group in kinds.items():
        errors = [row.relative_error for row in group if row.relative_error is not None]
        mean, worst = (f"{sum(errors) / len(errors):.5f}", f"{max(errors):.5f}") if errors else ("-", "-")
        lines.append(
            f"{kind:<16}{len(group):>6}{'x'.join(map(str, group[0].shape)):>14}"
            f"{sum(row.sparsity for row in group) / len(group):>10.4f}"
            f"{mean:>12}{worst:>11}{sum(row.seconds for row in group):>9.1f}"
        )
    return "\n".join(lines)


def notes(rows: list[MatrixLog]) -> str:
    """Lines that name layers without input in calibration, and experts with less of it than they have inputs; or ""."""
    idle = [row.name for row in rows if row.relative_error is None]
    starved = [row.name for row in rows if row.tokens is not None and row.tokens < row.shape[1]]
    lines = ""
    if idle:
        lines += f"{len(idle)} layers had no input in calibration and were pruned by magnitude: {few(idle)}\n"
    if starved:
        lines += (
            f"{len(starved)} matrices of experts saw fewer tokens than their width ({few(starved)}): their statistics "
            "were filled up with the mean of their layer; a larger --calib_size helps\n"
        )
    return lines


def sparsity_line(masks: dict[str, Tensor], model: nn.Module) -> str:
    """Number of zero weights, in the pruned layers and in the whole model."""
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    pruned = sum(mask.numel() for mask in masks.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    stacked = [mask for mask in masks.values() if mask.dim() > 2]
    experts = f" and {sum(map(len, stacked))} matrices of experts" if stacked else ""
    return (
        f"{zeros:,} of {pruned:,} weights in {len(masks) - len(stacked)} linear layers{experts} are zero "
        f"({zeros / pruned:.2%}); "
        f"{zeros / total:.2%} of all weights (all other layers stay dense)"
    )


def working_bytes(rows: int, cols: int) -> int:
    """Peak bytes of float32 while weights [rows, cols] that share a Hessian [cols, cols] are pruned.

    Wide matrices need most when their Hessian is inverted, tall ones in the refit. Derived from the code, with the
    workspace of the libraries added; processes on the CPU peaked 1 to 26% below.
    """
    hessian, weights = cols * cols, rows * cols
    return 4 * max(4 * hessian + 2 * weights, hessian + 9 * weights)


def estimate(
    model: PreTrainedModel, recipe: Recipe, ignore: list[str], calibration: CalibrationSet, device: torch.device
) -> str:
    """Layers, shapes and a computed estimate of time and peak device memory; nothing is run but a few tokens.

    Memory on the device is the largest decoder layer, what its largest group needs at once (`working_bytes`), and one
    batch of activations. On the CPU all of it belongs to one process, with the libraries that this process has loaded.
    """
    if not calibration.sources:
        return "pruning without text reads each weight once: no calibration text, no forward pass"
    kind, length, tokens = device.type, calibration.length, calibration.size * calibration.length
    prefix, layers = decoder_layers(model)
    chosen, left_dense = choose_weights(model, recipe.pattern, ignore)
    stacked = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name in chosen}  # of experts
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in chosen - stacked.keys()}
    groups, _ = observe(model, chosen)
    # Count, rows of all and columns of weights that share a Hessian; experts have one each.
    sizes = [(1, sum(shapes[name][0] for name in group), shapes[group[0]][1]) for layer in groups for group in layer]
    sizes += stacked.values()
    flops = sum(count * flops_of(rows, cols, tokens // count, recipe) for count, rows, cols in sizes)
    batch_bytes, widest = 2 * calibration.batch_size * length * 4, max(cols for _, _, cols in sizes)
    hessians = max(4 * cols**2 * min(count, at_once(cols)) for count, _, cols in stacked.values()) if stacked else 0
    working = hessians + max(working_bytes(rows, cols) + batch_bytes * cols for _, rows, cols in sizes)
    layer, weights = max(map(size_of, layers)), size_of(model)
    in_bf16 = kind == "cpu" and model.dtype == torch.float32 and bf16_is_faster(device)
    width, element = model.get_input_embeddings().weight.shape[1], model.dtype.itemsize
    fitted = recipe.asymmetric * (2 * width + widest) * (2 if in_bf16 else element)  # of the dense model
    streams = tokens * (width * element + fitted)
    lines = [
        f"each of {len(layers)} decoder layers ({layer / MIB:.0f} MiB), groups that share a Hessian:",
        *(
            f"  input of {shapes[group[0]][1]:>6} columns: "
            + ", ".join(f"{name.removeprefix(prefix + '.0.')} {shapes[name]}" for name in group)
            for group in groups[0]
        ),
        *(
            f"  {count} experts, {min(count, at_once(cols))} at a time: {name} ({rows}, {cols})"
            for name, (count, rows, cols) in stacked.items()
            if name.startswith(min(stacked).rpartition(".")[0])
        ),
        f"{len(shapes)} linear layers are pruned to {recipe.pattern}, {len(left_dense)} others stay dense",
        f"calibration: {calibration.size} sequences of {length} tokens, {calibration.batch_size} at a time",
        f"computed peak memory on the {kind} device: {(layer + working) / MIB:,.0f} MiB",
        f"computed host memory: {weights / MIB:,.0f} MiB weights + {streams / MIB:,.0f} MiB activations",
    ]
    if kind == "cpu":
        peak = (weights + streams + layer + working) / MIB + peak_memory_mib(device)
        lines.append(f"computed peak memory of the process: {peak:,.0f} MiB")
    lines.append(f"computed time: about {flops / FLOPS[kind] / (BF16_GAIN if in_bf16 else 1):,.0f} s")
    counts = zip(calibration.sources, shares(calibration.sources, calibration.size), strict=True)
    if written := sum(count for source, count in counts if source.spec == SELF):
        at_a_time = sequences_at_once(model, length, writing_dtype(device))
        parameters = weights / element
        step = 4 * parameters / BANDWIDTH[kind] + parameters * at_a_time / (2 * FLOPS[kind])  # reads all weights once
        lines.append(
            f"self-generated text: {written} sequences of {length} tokens, about "
            f"{ceil(written / at_a_time) * length * step:,.0f} s more where no earlier run has left it in the cache"
        )
    return "\n".join(lines)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def flops_of(rows: int, cols: int, tokens: int, recipe: Recipe) -> float:
    """Operations to prune weights [rows, cols] that share a Hessian, calibration passes included."""
    passes = 1.0 if recipe.dense_inputs else 1.6
    passes += 1.3 * recipe.asymmetric  # the pruned model's: up to the attention's output, then all of the layer
    search = 2 * rows * cols * cols * (2 + recipe.refit_iterations)
    return 2 * tokens * rows * cols * passes + 2 * tokens * cols * cols + search + cols**3


def describe_plan(model: PreTrainedModel, recipe: Recipe, ignore: list[str]) -> str:
    """The layers to prune, and a line per reason why others stay dense; every line ends with a line break.

    Raises:
        UserError: nothing can be pruned, or a glob of `ignore` matches nothing.
    """
    chosen, left_dense = choose_weights(model, recipe.pattern, ignore)
    layers = decoder_layers(model)[1]
    inside = set(layers.modules())
    outside = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module not in inside]
    reasons: dict[str, list[str]] = {}
    for name, reason in left_dense.items():
        reasons.setdefault(reason, []).append(name)
    stacked = [weight for name, weight in model.named_parameters() if name in chosen]
    experts = f" and {sum(map(len, stacked))} matrices of experts" if stacked else ""
    lines = [
        f"{len(layers)} decoder layers, {len(chosen) - len(stacked)} linear layers{experts} to prune "
        f"to {recipe.pattern}"
    ]
    lines += [f"left dense (outside the decoder layers): {few(outside)}"] if outside else []
    lines += [f"left dense ({reason}): {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"
