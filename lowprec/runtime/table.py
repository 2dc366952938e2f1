"""A table of a vocabulary that runs in its codes: what an embedding reads of it, and what a head multiplies with it.

`QuantTable` holds the codes once, in one part or, of rows of two widths, in two. `QuantEmbedding` decodes the rows that
it is asked for. `QuantHead` multiplies with each part by the kernel that is the fastest for it, and puts the logits
into the order of the vocabulary.
"""

import copy

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, for_tables, resolve, scheme_named
from lowprec.formats.asymmetric import from_offset
from lowprec.formats.rows import MixedRows
from lowprec.records import Scheme
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.linear import QuantLinear
from lowprec_kernels.packing import unpack_int4

Part = tuple[Scheme, QuantizedWeight]


def parts_of(scheme: Scheme, weight: QuantizedWeight) -> tuple[Tensor | None, list[Part]]:
    """The weight in parts of one format each, and which rows belong to the first one ([N] bool, None: all)."""
    fmt = WEIGHT_FORMATS[weight.format]
    if not isinstance(fmt, MixedRows):
        return None, [(scheme, weight)]
    rows, fine, coarse = fmt.split(weight)
    return rows, [(scheme_named("w8a16"), fine), (scheme_named(f"w4a16-g{fmt.group_size}"), coarse)]


class QuantHead(nn.Module):
    """y = x W^T + b with the rows of W in two widths.

    Args:
        scheme: one for tables.
        weight: [N, K] in the scheme's format.
        bias: [N] or None.
        kernels: a table to choose from, or the name of one kernel.
    """

    place: Tensor

    def __init__(
        self, scheme: Scheme, weight: QuantizedWeight, bias: Tensor | None, kernels: "KernelTable | str"
    ) -> None:
        super().__init__()
        resolved = resolve(scheme, weight.codes.shape[1])
        if not for_tables(resolved) or resolved.weight != weight.format:
            raise ConfigError(f"scheme {scheme.name} is none of rows of two widths in {weight.format}")
        rows, parts = parts_of(resolved, weight)
        assert rows is not None
        order = torch.cat([rows.nonzero().flatten(), (~rows).nonzero().flatten()])
        biases = [None, None] if bias is None else [bias[rows], bias[~rows]]
        self.scheme = resolved
        self.in_features, self.out_features = weight.codes.shape[1], len(rows)
        self.parts = nn.ModuleList(
            QuantLinear.from_quantized(part, kind, b, kernels=kernels)
            for (kind, part), b in zip(parts, biases, strict=True)
        )
        # Where the parts' outputs stand, for each row of the vocabulary.
        self.register_buffer("place", torch.argsort(order))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N] in x's dtype."""
        return torch.cat([part(x) for part in self.parts], dim=-1).index_select(-1, self.place)


def stored(
    scheme: Scheme, weight: QuantizedWeight, bias: Tensor | None, kernels: "KernelTable | str"
) -> "QuantLinear | QuantHead":
    """The codes of a table [N, K] as the layer that multiplies with them, in a scheme without static activations."""
    if for_tables(scheme):
        return QuantHead(scheme, weight, bias, kernels)
    return QuantLinear.from_quantized(weight, scheme, bias, kernels=kernels)


class QuantEmbedding(nn.Module):
    """The rows of a quantised table, decoded when they are asked for.

    Args:
        head: the layer whose rows it reads.
        like: the embedding that it stands for.
        owns: whether the codes of `head` are this module's; else they are those of a head elsewhere in the model.
    """

    def __init__(self, head: "QuantLinear | QuantHead", like: nn.Embedding, owns: bool = False) -> None:
        super().__init__()
        if like.max_norm is not None:
            raise ConfigError("an embedding with max_norm rewrites its rows, codes cannot be: keep it as it is")
        self.num_embeddings, self.embedding_dim, self.padding_idx = head.out_features, head.in_features, None
        self.dtype = like.weight.dtype
        if owns:
            self.table = head
        # Neither is a submodule: a head is one elsewhere in the model, and `like` would keep its weight in it.
        self.__dict__["_head"] = head
        self.__dict__["_like"] = copy.copy(like)
        self.__dict__["_like"]._parameters = {}

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int -> [..., K] in the dtype of the embedding that it stands for."""
        head, flat = self.__dict__["_head"], ids.flatten()
        if isinstance(head, QuantLinear):
            found = _rows(head, flat)
        else:
            places, fine = head.place[flat], head.parts[0].out_features
            found = torch.where(
                (places < fine)[:, None],
                _rows(head.parts[0], places.clamp_max(fine - 1)),
                _rows(head.parts[1], (places - fine).clamp_min(0)),
            )
        return read_as(self.__dict__["_like"], found.to(self.dtype), ids.shape)

    def _apply(self, fn: object, recurse: bool = True) -> "QuantEmbedding":
        """Follows a cast of the model, and moves codes that are its own."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # type: ignore[operator]
        return self


def read_as(like: nn.Embedding, rows: Tensor, shape: torch.Size) -> Tensor:
    """What `like` makes of `rows` [R, K] when it has read them: [*shape, K], R being the product of `shape`.

    Models have embeddings of their own kinds (Gemma's scales what it reads), so theirs is what is run.
    """
    reader = copy.copy(like)
    # It matters while training alone, and may lie beyond the rows that were read.
    reader.padding_idx = None
    reader._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
    read: Tensor = reader.forward(torch.arange(len(rows), device=rows.device).view(shape))
    return read


def _rows(layer: QuantLinear, which: Tensor) -> Tensor:
    """Rows of the layer's weight, [R, K] float32."""
    operands = layer.operands()
    codes = operands.codes[which]
    values = unpack_int4(codes, operands.k) if operands.weight == "int4" else codes
    if operands.zero is not None:
        values = from_offset(values, operands.zero[which])
    if operands.scale is None:
        return values.to(torch.float32)
    scale = operands.scale[which]
    return (values.to(torch.float32).view(len(which), scale.shape[1], -1) * scale[..., None]).view(len(which), -1)
