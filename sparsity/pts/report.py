"""What a pruning run will cost, and what it did: the texts that hf_pts.py prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster, peak_memory_mib
from sparsity.models import decoder_layers
from sparsity.pts.structure import choose_linears, shared_inputs
from sparsity.pts.log import MatrixLog
from sparsity.pts.recipe import Recipe
from sparsity.generated_text import batch_count, sequences_at_once, writing_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MIB = 2**20


# Sustained multiplications and additions a second, all else included: of a laptop's cores, and of an H100.
FLOPS = {"cpu": 1.5e11, "cuda": 5e13}
HALF_GAIN = 1.5  # on a CPU that multiplies bfloat16, where forward passes and statistics are so
BANDWIDTH = {"cpu": 8e9, "cuda": 1.5e12}  # sustained bytes a second from memory


def error_table(rows: list[MatrixLog]) -> str:
    """A line per kind of linear layer (q_proj, …): how many, sparsity, relative error, seconds."""
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


def sparsity_line(masks: dict[str, Tensor], model: nn.Module) -> str:
    """How many weights are zero, of the pruned layers and of the whole model."""
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    pruned = sum(mask.numel() for mask in masks.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{zeros:,} of {pruned:,} weights in {len(masks)} linear layers are zero ({zeros / pruned:.2%}); "
        f"{zeros / total:.2%} of all weights (embeddings, norms and the output head stay dense)"
    )


def working_bytes(rows: int, cols: int, recipe: Recipe) -> int:
    """Peak bytes of float32 while weights [rows, cols] that share a Hessian [cols, cols] are pruned.

    Wide matrices need most when their Hessian is inverted (or its eigenvectors found), tall ones in the refit (or in
    ADMM). Derived from the code, with the workspace of the libraries added; processes on the CPU peaked 1 to 26% below.
    """
    hessian, weights = cols * cols, rows * cols
    if recipe.admm_iterations:
        return 4 * max(6 * hessian + 3 * weights, 2 * hessian + 10 * weights)
    return 4 * max(4 * hessian + 2 * weights, hessian + 9 * weights)


def estimate(
    model: PreTrainedModel,
    recipe: Recipe,
    ignore: list[str],
    calibration: tuple[int, int, int],
    kind: str,
    writer: PreTrainedModel | None = None,
) -> str:
    """Layers, shapes and a computed estimate of time and peak device memory; nothing is run but eight tokens.

    Args:
        calibration: sequences, tokens per sequence, sequences per batch.  kind: "cpu" or "cuda".
        writer: an empty model in the dtype in which it writes text; None where it writes none.

    Memory on the device is the largest decoder layer, what its largest group needs at once (`working_bytes`), and one
    batch of activations. On the CPU all of it belongs to one process, with the libraries that this process has loaded.
    Masks of finished layers stay on disk until the state is written.
    """
    sequences, length, batch_size = calibration
    prefix, layers = decoder_layers(model)
    chosen, left_dense = choose_linears(model, recipe.pattern, ignore)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in chosen}
    plan = shared_inputs(model, chosen)
    tokens, batch_tokens = sequences * length, batch_size * length
    lines, flops, working = [], 0.0, 0.0
    for name in plan[0]:
        rows, cols = sum(shapes[linear][0] for linear in name), shapes[name[0]][1]
        lines.append(
            f"  input of {cols:>6} columns: " + ", ".join(f"{n.removeprefix(prefix + '.0.')} {shapes[n]}" for n in name)
        )
    for groups in plan:
        for group in groups:
            rows, cols = sum(shapes[linear][0] for linear in group), shapes[group[0]][1]
            passes = 1.0 if recipe.dense_inputs else 1.6
            passes += 1.3 * recipe.asymmetric  # the pruned model's: up to the attention's output, then all of the layer
            forward = 2 * tokens * rows * cols * passes
            search = 2 * rows * cols * cols * (2 + recipe.refit_iterations + 2 * recipe.admm_iterations)
            flops += forward + 2 * tokens * cols * cols + search + (20 * cols**3 if recipe.admm_iterations else cols**3)
            working = max(working, working_bytes(rows, cols, recipe) + 2 * batch_tokens * cols * 4)
    layer = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)
    width = model.get_input_embeddings().weight.shape[1]
    element = next(model.parameters()).element_size()
    half = kind == "cpu" and element == 4 and bf16_is_faster(torch.device(kind))
    streams = tokens * width * element
    if recipe.asymmetric:  # the dense model's, and for one layer at a time the inputs of its last linear layer
        widest = max(shapes[groups[-1][0]][1] for groups in plan if groups)
        streams += tokens * (width + widest) * (2 if half else element)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    process = []
    if kind == "cpu":
        peak = max(weights + streams + layer + working, writing_bytes(writer, length) if writer is not None else 0)
        libraries = peak_memory_mib(torch.device(kind))
        process = [
            f"computed peak memory of the process: {peak / MIB + libraries:,.0f} MiB ({libraries:,.0f} libraries)"
        ]
    speed = FLOPS[kind] * (HALF_GAIN if half else 1)
    return "\n".join(
        [
            f"each of {len(layers)} decoder layers ({layer / MIB:.0f} MiB), groups that share a Hessian:",
            *lines,
            f"{len(chosen)} linear layers are pruned to {recipe.pattern}, {len(left_dense)} others stay dense",
            f"calibration: {sequences} sequences of {length} tokens, {batch_size} at a time",
            f"computed peak memory on the {kind} device: {(layer + working) / MIB:,.0f} MiB",
            f"computed host memory: {weights / MIB:,.0f} MiB weights + {streams / MIB:,.0f} MiB activations "
            f"+ {sum(r * c for r, c in shapes.values()) / MIB:,.0f} MiB masks",
            *process,
            f"computed time: about {flops / speed:,.0f} s ({flops:.1e} operations, {speed:.1e} a second)",
        ]
    )


def self_text_estimate(model: PreTrainedModel, sequences: int, length: int, kind: str) -> str:
    """A line with the computed time in which the model writes text; each step reads all weights once."""
    size = sequences_at_once(model, length, model.dtype)
    weights = sum(p.numel() for p in model.parameters())
    step = 2 * weights * 2 / BANDWIDTH[kind] + 2 * weights * size / (4 * FLOPS[kind])
    seconds = batch_count(sequences, size) * length * step
    return (
        f"self text: {sequences} sequences of {length} tokens, {size} at a time; "
        f"computed time: about {seconds:,.0f} s, none where an earlier run has left it in the cache"
    )


def describe_plan(model: PreTrainedModel, recipe: Recipe, ignore: list[str]) -> str:
    """What will be pruned, and what stays dense and why; lines that end with a line break.

    Raises:
        UserError: nothing can be pruned, or a glob of `ignore` matches nothing.
    """
    chosen, left_dense = choose_linears(model, recipe.pattern, ignore)
    count = len(decoder_layers(model)[1])
    first = f"{count} decoder layers, {len(chosen)} linear layers to prune to {recipe.pattern}\n"
    return first + describe_dense(left_dense)


def describe_dense(left_dense: dict[str, str]) -> str:
    """Names of the weights that stay dense inside the decoder layers, a line per reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_dense.items():
        reasons.setdefault(reason, []).append(name)
    return "".join(f"left dense ({reason}): {', '.join(names)}\n" for reason, names in reasons.items())
