"""Inspect saved weights matrix by matrix, without building the model: pattern and zeros."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from sparsity.errors import UserError
from sparsity.files import open_safetensors, safetensors_files
from sparsity.modelopt_state import is_mask, load_state, pattern_of, require_masks, weight_name
from sparsity.pattern import Pattern

TWO_FOUR = Pattern()
# Names of weights that are no matrices: biases, and kernels of convolutions.
NO_MATRIX = r"bias$|conv|_mask$"
# Names of embeddings, output heads, routers and vision or audio towers in all model families: they stay dense.
DENSE_BY_DESIGN = (
    r"embed|per_layer_model|lm_head|wte|wpe|word_emb|position_emb|router|\bgate\.weight|score\.weight|"
    r"vision|visual|audio|multi_modal"
)

# Types in safetensors with several elements in a byte; quantizers store packed integers as U8.
PACKED = ("U8", "F4", "F6_E2M3", "F6_E3M2")


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """One weight matrix [rows, columns]; groups of a pattern run along the columns, the input dimension.

    The matrices of experts that are stored together [experts, …, …] are reported together. Their groups run along
    either of the two last dimensions, whichever is the input.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zero_share: float  # of all elements
    pattern: str  # that it was compared with
    fits: bool  # it has the zeros of the pattern
    negative_zeros: int  # elements that are -0.0


def inspect_matrix(
    name: str, weight: torch.Tensor, mask: torch.Tensor | None = None, pattern: Pattern = TWO_FOUR
) -> MatrixReport:
    """Report on a matrix [rows, columns] or on those of experts; with a bool mask, on what the mask leaves of it."""
    stored = weight.dtype
    if weight.element_size() == 1 and weight.is_floating_point():
        weight = weight.float()  # torch compares no 8-bit floats
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    zeros = weight == 0
    return MatrixReport(
        name=name,
        shape=tuple(weight.shape),
        dtype=str(stored).removeprefix("torch."),
        zero_share=zeros.sum().item() / max(1, weight.numel()),
        pattern=str(pattern),
        fits=pattern.fits(weight),
        negative_zeros=int((zeros & torch.signbit(weight)).sum()),
    )


def zero_totals(reports: Iterable[MatrixReport]) -> tuple[int, float]:
    """Elements of all matrices together, and how many of them are zero."""
    sizes = [(math.prod(report.shape), report.zero_share) for report in reports]
    return sum(size for size, _ in sizes), sum(size * share for size, share in sizes)


def inspect_path(
    path: str | Path, exclude: str = DENSE_BY_DESIGN, pattern: Pattern | None = None
) -> Iterator[MatrixReport]:
    """Reports of a modelopt state's masked matrices, or of a safetensors file's or folder's weight matrices.

    In a state the masks tell what is meant to be sparse. A safetensors folder does not say, so every 2-D tensor called
    "…weight" counts, and every 3-D one (matrices of experts) that is no convolution's, except names that match the
    regular expression `exclude`.

    Args:
        pattern: to compare with; by default a state's own, and 2:4 for a folder.

    Raises:
        UserError: the path does not exist, has nothing to inspect, or a file is damaged or missing.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a modelopt state, a safetensors file or a model folder")
    if not is_state(path):
        return _inspect_safetensors(path, re.compile(exclude), pattern or TWO_FOUR)
    return _inspect_state(path, pattern)


def is_state(path: str | Path) -> bool:
    """Whether a path is taken for a modelopt state, and not for safetensors."""
    return Path(path).is_file() and Path(path).suffix != ".safetensors"


def _inspect_state(path: Path, pattern: Pattern | None) -> Iterator[MatrixReport]:
    state = load_state(path)
    tensors, pattern = state["model_state_dict"], pattern or pattern_of(state, path)
    for mask in require_masks(tensors, path):
        yield inspect_matrix(weight_name(mask), tensors[weight_name(mask)], tensors[mask], pattern)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor holds the weights of a linear layer or of experts."""
    return bool((len(shape) == 2 and name.endswith("weight")) or (len(shape) == 3 and not re.search(NO_MATRIX, name)))


def unmasked(path: str | Path) -> dict[str, int]:
    """Elements of each weight matrix of a state that has no mask, apart from those that stay dense by design."""
    tensors = load_state(path)["model_state_dict"]
    masked = {weight_name(name) for name in tensors if is_mask(name)}
    names = [name for name in tensors.keys() - masked if not is_mask(name) and not re.search(DENSE_BY_DESIGN, name)]
    return {name: tensors[name].numel() for name in sorted(names) if is_matrix(name, tensors[name].shape)}


def _inspect_safetensors(path: Path, exclude: re.Pattern, pattern: Pattern) -> Iterator[MatrixReport]:
    empty = True
    for file in safetensors_files(path):
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no dict
                shape = tensors.get_slice(name).get_shape()
                if is_matrix(name, shape) and all(shape) and not exclude.search(name):
                    if tensors.get_slice(name).get_dtype() in PACKED:
                        raise UserError(f"{file}: {name} is packed to fewer than 8 bits; it cannot be inspected")
                    empty = False
                    yield inspect_matrix(name, tensors.get_tensor(name), pattern=pattern)
    if empty:
        raise UserError(f"{path} holds no weight matrices to inspect (embeddings and output heads do not count)")
