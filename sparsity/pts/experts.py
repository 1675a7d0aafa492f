"""The experts of a mixture, as linear layers while they are pruned.

Transformers keeps the experts of a layer together, in weights [experts, out, in] or [experts, in, out], and multiplies
by slices of them. Here a slice becomes a linear layer, which statistics can watch and solvers prune: wherever the
model's code multiplies by it, the product is handed to that layer. So no family of models needs to be named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsity.models import text_fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HESSIAN_BYTES = 2**33  # of the Hessians of as many experts as are collected in one pass

# Functions of (inputs, weight, …) → whether they take the weight as [out, in].
PRODUCTS: dict[Callable, bool] = {
    nn.functional.linear: True,
    torch.matmul: False,
    Tensor.matmul: False,
    Tensor.__matmul__: False,
    torch.mm: False,
    Tensor.mm: False,
    torch.bmm: False,
    Tensor.bmm: False,
}


def expert_counts(config: PretrainedConfig) -> set[int]:
    """Numbers of experts in a layer, under the names that configurations have for them; none for a dense model."""
    fields = text_fields(config)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {fields[name] for name in names if isinstance(fields.get(name), int)}


def expert_weights(module: nn.Module, counts: set[int], prefix: str = "") -> dict[str, nn.Parameter]:
    """Weights [experts, …, …] of the experts in a module, by name, those of the first products first."""
    return {
        f"{prefix}.{name}".lstrip("."): weight
        for name, weight in module.named_parameters()
        if weight.dim() == 3 and len(weight) in counts and min(weight.shape) > 1
    }


def at_once(cols: int) -> int:
    """Number of experts with inputs [cols, tokens] whose statistics are collected in one pass."""
    return max(1, HESSIAN_BYTES // (4 * cols**2))


@contextmanager
def one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, experts are computed one after the other, not in grouped products."""
    with ExitStack() as stack:
        if hasattr(model, "set_experts_implementation"):  # in transformers 5
            stack.callback(model.set_experts_implementation, model.config._experts_implementation)
            model.set_experts_implementation("eager")
        yield


class Experts(TorchFunctionMode):
    """The experts of a decoder layer as linear layers, which compute all products with them within a `with` block.

    Args:
        names: weights within the decoder layer to hand over; a dictionary says whether each is transposed, otherwise
            the first product with it tells.

    Attributes:
        transposed: name of a weight within the decoder layer → whether it is [experts, in, out]; known of those that
            have been used in a product.
        linears: name of such a weight → the linear layers of its experts, whose weights are parts of it.
    """

    def __init__(self, layer: nn.Module, names: Iterable[str] | dict[str, bool]):
        super().__init__()
        self.weights = {name: layer.get_parameter(name) for name in names}
        self.transposed: dict[str, bool] = {}
        self.linears: dict[str, list[nn.Linear]] = {}
        self._places = {
            (weight.untyped_storage()._cdata, weight.storage_offset() + number * weight.stride(0)): (name, number)
            for name, weight in self.weights.items()
            for number in range(len(weight))
        }
        if isinstance(names, dict):
            for name, transposed in names.items():
                self._split(name, transposed)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        place = None
        if func in PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            place = self._places.get((args[1].untyped_storage()._cdata, args[1].storage_offset()))
        if place is None:
            return func(*args, **(kwargs or {}))
        inputs, operand, (name, number) = args[0], args[1], place
        if name not in self.linears:
            as_stored = operand.stride()[-2:] == self.weights[name].stride()[-2:]
            self._split(name, PRODUCTS[func] != as_stored)
        linears = self.linears[name]
        if operand.dim() == 3:  # all experts at once, with inputs [experts, tokens, in]
            return torch.stack([routed(linear, part) for linear, part in zip(linears, inputs, strict=True)])
        output, bias = linears[number](inputs), (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
        return output if bias is None else output + bias

    def _split(self, name: str, transposed: bool) -> None:
        self.transposed[name], self.linears[name] = transposed, []
        for matrix in self.weights[name].detach():
            matrix = matrix.t() if transposed else matrix
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix)
            self.linears[name].append(linear)

    def join(self, name: str, matrices: list[Tensor]) -> Tensor:
        """Put together what there is for each expert [out, in], in the layout of the weight."""
        stacked = torch.stack(matrices)
        return stacked.transpose(1, 2).contiguous() if self.transposed[name] else stacked

    def write_back(self) -> None:
        """Give the weights of the decoder layer the values that their linear layers have now."""
        for name, linears in self.linears.items():
            self.weights[name].data = self.join(name, [linear.weight.data for linear in linears])


def routed(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """Outputs for inputs [tokens, in] of which the rows are zero that are meant for other experts."""
    rows = inputs.ne(0).any(-1)
    outputs = linear(inputs[rows])
    return outputs.new_zeros(len(inputs), linear.out_features).index_put_((rows,), outputs)
