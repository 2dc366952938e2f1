"""Rotations: another orthonormal basis for what is added up between the blocks, and for what attention heads read.

    hidden states (R1)   x' = x Q,  Q^T Q = I;   reader: W' = W diag(g) Q,   writer: W' = Q^T W,   embedding: E' = E Q
    inside a head (R2)   v' = v R,  R^T R = I;   value: W' = R^T W and b' = R^T b for each head,   output: W' = W R

A norm that divides by the root of the mean square gives the same for x and x Q but for its own weight g, which is moved
into the layers that read it (QuaRot, arXiv 2404.00456, section 4, stage 1a; SliceGPT, arXiv 2401.15024, theorem 1).
Attention sums values with weights that are the same for all channels of a head, so a head's output turns with them. All
of it happens before anything is rounded, so no runtime pays for it. The head of the model reads such a norm, too: where
it is tied to the embedding they part, which costs a table.

    Q = diag(random signs) (H_p kron R_m),    width = p m, p a power of two, m odd

with H the Hadamard matrix and R_m a random orthogonal one, so that widths such as 576 = 64 x 9 have one, too.

It pays where inputs are rounded. SmolLM2-135M, every input in INT8 by token and the weights untouched, KL in nats over
10 k tokens of four texts, and what the inputs of one kind of layer have in it:

                         all      qkv      gate and up   down     o
    as it is             0.0303   0.0151   0.0096        0.0109   0.0021
    R1                   0.0131   0.0025   0.0027        0.0118   0.0022
    smoothed             0.0097
    R1 and smoothed      0.0078

(R1 then had its signs behind the Hadamard matrix. `bench/quality/inputs.py` measures all of it.) What it wins where
weights are rounded is in `bench/README.md`: INT4 g64, healed, +5.8 % instead of +6.9 %, with inputs in INT8 +6.0 %
instead of +8.9 %.

Left out: rotations that a runtime would have to compute (QuaRot's R3 and R4, of queries, keys and the input of down).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowprec.runtime.convert import stored_weight, weight_of
from lowprec.transforms.merge import Merge

PART = 4_096
"""Rows that are in float64 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenBasis:
    """What has to change so that the hidden states may have another basis.

    Attributes:
        width: of the hidden states.
        embeddings: names of the embeddings that they begin with.
        norms: norm -> the layers that read it.
        writers: layers whose output is added to them.
    """

    width: int
    embeddings: tuple[str, ...]
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """Everything in a model that may have another basis: its hidden states, and what heads give at some places."""

    basis: HiddenBasis
    heads: tuple[Merge, ...] = ()

    def apply(self, module: nn.Module, seed: int = 0) -> None:
        """Turns all of it at random, in place, in the weights' own dtype; no two places by the same rotation."""
        rotate(module, self.basis, orthogonal(self.basis.width, seed))
        for number, place in enumerate(self.heads):
            rotate_heads(module, place, orthogonal(place.head, seed + number))

    def within(self, holds: Callable[[str], bool]) -> "Turning":
        """What of it lies in a part of the model, which is told by the names of the modules that it holds."""
        basis = replace(
            self.basis,
            embeddings=tuple(filter(holds, self.basis.embeddings)),
            norms=tuple((norm, readers) for norm, readers in self.basis.norms if holds(norm)),
            writers=tuple(filter(holds, self.basis.writers)),
        )
        return Turning(basis=basis, heads=tuple(place for place in self.heads if holds(place.source)))


def orthogonal(width: int, seed: int = 0) -> Tensor:
    """[width, width] float64: the Hadamard matrix of the largest power of two, a random rest, and random signs."""
    generator = torch.Generator().manual_seed(seed)
    power = width & -width
    rest, _ = torch.linalg.qr(torch.randn(width // power, width // power, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    # Signs come before the Hadamard matrix: behind it they would leave every seed the same spread.
    return signs[:, None] * torch.kron(_hadamard(power), rest.contiguous())


def _hadamard(size: int) -> Tensor:
    """[size, size] float64, orthonormal (Sylvester's construction); `size` is a power of two."""
    found = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(found) < size:
        found = torch.kron(step, found)
    return found


@torch.no_grad()
def rotate(module: nn.Module, basis: HiddenBasis, rotation: Tensor) -> None:
    """Turns the hidden states of `module` by `rotation` [width, width] float64, in place, in the weights' own dtype.

    Weights are replaced, not overwritten: one that is tied to another is parted from it.
    """
    for name, readers in basis.norms:
        gain = _take_gain(module.get_submodule(name))
        for reader in readers:
            layer = module.get_submodule(reader)
            _set(layer, _rows_times(weight_of(layer), gain[:, None] * rotation))
    for name in basis.writers:
        layer = module.get_submodule(name)
        _set(layer, rotation.T @ weight_of(layer).double())
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            _replace(layer, "bias", rotation.T @ bias.detach().double())
    for name in basis.embeddings:
        table = module.get_submodule(name)
        _set(table, _rows_times(weight_of(table), rotation))


@torch.no_grad()
def rotate_heads(module: nn.Module, place: Merge, rotation: Tensor) -> None:
    """Turns what the heads at `place` give by `rotation` [head, head] float64, in place, in the weights' own dtype."""
    head, rows = len(rotation), slice(place.offset, place.offset + place.channels)
    source = module.get_submodule(place.source)
    whole = weight_of(source).to(torch.float64, copy=True)
    whole[rows] = (rotation.T @ whole[rows].view(-1, head, whole.shape[1])).flatten(0, 1)
    _set(source, whole)
    if isinstance(bias := getattr(source, "bias", None), Tensor):
        given = bias.detach().to(torch.float64, copy=True)
        given[rows] = (given[rows].view(-1, head) @ rotation).flatten()
        _replace(source, "bias", given)
    for name in place.consumers:
        layer = module.get_submodule(name)
        weight = weight_of(layer).double()
        _set(layer, (weight.reshape(len(weight), -1, head) @ rotation).flatten(1))


def _rows_times(weight: Tensor, right: Tensor) -> Tensor:
    """weight [N, K] @ right [K, K] float64, in the weight's dtype; a part of the rows of a vocabulary at a time."""
    made = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows, into in zip(torch.split(weight, PART), torch.split(made, PART), strict=True):
        into.copy_(rows.double() @ right)
    return made


def gain_of(norm: nn.Module) -> Tensor:
    """The norm's gain for each channel, [width] float64."""
    return _weight(norm).detach().double() + _offset(norm)


def _take_gain(norm: nn.Module) -> Tensor:
    """The norm's gain; it is left with one of 1."""
    gain = gain_of(norm)
    _replace(norm, "weight", torch.full_like(gain, 1.0 - _offset(norm)))
    return gain


def _offset(norm: nn.Module) -> float:
    """Some norms multiply with their weight (0), some with one more than that (1)."""
    weight = _weight(norm)
    kept = weight.detach().clone()
    weight.detach().zero_()
    made: Tensor = norm(torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device))
    weight.detach().copy_(kept)
    return float(round(float(made[0, 0])))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _set(layer: nn.Module, weight: Tensor) -> None:
    _replace(layer, "weight", stored_weight(layer, weight))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    dtype = getattr(module, name).dtype
    module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
