"""Finds where the hidden states of a model are read and written, so that their basis can be turned.

No architecture is known by name: one forward pass shows which norms the layers read and which layers write. Whether the
model has such a basis at all is tried, on a copy in float64: models with a norm that takes means (LayerNorm), with a
norm on what is added (Gemma), or with positions that are learned have none.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import UnsupportedError
from lowprec.steps.linear import output_width
from lowprec.steps.stream import Forward, Stream
from lowprec.transforms.rotation import HiddenBasis, gain_of, orthogonal, rotate

REFUSED = "the hidden states of this model cannot be turned"
EXACT = 1e-9
"""Largest change of an output in float64, relative to the largest output."""


def hidden_basis(stream: Stream, example: Any) -> HiddenBasis:
    """What has to change so that the hidden states may have another basis.

    Raises:
        UnsupportedError: the hidden states of this model cannot be turned.
    """
    if not stream.token_tables or stream.whole:
        raise UnsupportedError(REFUSED, ("no embedding that tokens read, or no blocks",))
    embeddings = stream.token_tables
    width = int(stream.tables[embeddings[0]].weight.shape[1])
    if not (norms := _norms(stream, example, width)):
        raise UnsupportedError(REFUSED, ("its layers read no norm that has a weight and nothing else",))
    reading = {name for readers in norms.values() for name in readers}
    inside = (name for name in stream.layers if stream.block_of(name) is not None)
    writers = tuple(n for n in inside if n not in reading and output_width(stream.layers[n]) == width)
    basis = HiddenBasis(width=width, embeddings=embeddings, norms=tuple(norms.items()), writers=writers)
    change = _change(stream.module, stream.forward, example, basis)
    if not change <= EXACT:
        raise UnsupportedError(REFUSED, (f"turned in float64, its outputs change by {change:.1e} of the largest",))
    return basis


def _norms(stream: Stream, example: Any, width: int) -> dict[str, tuple[str, ...]]:
    """Norm -> the layers that are given its output."""
    made: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def made_by(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            kept.append(output)
            made[output.data_ptr()] = name

        return hook

    def read_by(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if (norm := made.get(args[0].data_ptr())) is not None:
                readers.setdefault(norm, []).append(name)

        return hook

    handles: list[Any] = []
    for name, module in stream.module.named_modules():
        if name in stream.layers:
            handles.append(module.register_forward_pre_hook(read_by(name)))
        elif [p.shape for p in module.parameters(recurse=False)] == [(width,)]:
            handles.append(module.register_forward_hook(made_by(name)))
    try:
        with torch.no_grad():
            stream.forward(stream.module, example)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: tuple(names) for norm, names in readers.items()}


class _Norm64(nn.Module):
    """A root-mean-square norm that computes in the dtype of its input; models' own compute in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        eps = [v for name, v in vars(norm).items() if "eps" in name and isinstance(v, float)]
        self.eps = eps[0] if eps else 0.0
        self.weight = nn.Parameter(gain_of(norm), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def exact_copy(module: nn.Module, basis: HiddenBasis) -> Any:
    """A copy that computes in float64 throughout.

    Raises:
        UnsupportedError: a norm is none of the root of the mean square.
    """
    made = copy.deepcopy(module).double()
    for name, _ in basis.norms:
        norm = made.get_submodule(name)
        exact = _Norm64(norm)
        x = torch.linspace(-1, 2, basis.width, dtype=torch.float64)
        if not torch.allclose(norm(x).double(), exact(x), rtol=1e-4, atol=1e-5):
            raise UnsupportedError(REFUSED, (f"{name} is no norm of the root of the mean square",))
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, exact)
    return made


def _change(module: nn.Module, forward: Forward, example: Any, basis: HiddenBasis) -> float:
    """Largest change of an output in float64, relative to the largest output."""
    with torch.no_grad():
        turned = exact_copy(module, basis)
        before = forward(turned, example)
        rotate(turned, basis, orthogonal(basis.width))
        after = forward(turned, example)
    return float((after - before).abs().max() / before.abs().max())
