"""Weights of products as arrays: what codes the plan gave them, and those of another grid that a runtime takes.

Runtimes that quantise whole graphs take weights of one scale per output channel (or per tensor), symmetric. Codes of
the plan that are so are kept, bit for bit. All others, 4 bits in blocks, zero points, FP8, and weights that the plan
left in float, are rounded once more, to nearest; what that loses is part of what is measured of the form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.base import WeightFormat
from lowprec.formats.integer import SymmetricInteger
from lowprec.onnx.each_product import Product, replace_products
from lowprec.onnx.graph import Graph, lazy_constant
from lowprec.onnx.matching import Array
from lowprec.onnx.places import replace_nodes

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """A weight [K, N] in codes.

    Attributes:
        codes: [K, N] int8.
        scale: [N] float32, or [1] for the whole tensor.
        bits: of a code.
        kept: whether codes and scales are the plan's.
    """

    codes: Array
    scale: Array
    bits: Bits
    kept: bool


def place_dense(graph: Graph, solved: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Puts the weight of each planned product into the graph as a float32 constant [K, N], in place.

    Returns:
        Name of the constant -> the weight; of rows of two widths, of each part.

    Raises:
        UnsupportedError: planned layers that are not where they should be.
    """
    found: dict[str, QuantizedWeight] = {}

    def product(inner: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
        n, k = weight.codes.shape
        name = f"{layer}.dense"
        found[name] = weight
        value = lazy_constant(inner, name, ir.DataType.FLOAT, (k, n), lambda: _across(weight.dequantize()))
        return [ir.node("MatMul", [x, value])]

    replace_products(graph, solved, product)
    return found


def code_dense(graph: Graph, planned: Mapping[str, QuantizedWeight], product: Product) -> tuple[str, ...]:
    """Puts `product` into the place of each product with a constant that `place_dense` made, in place.

    For operators whose outputs have a size that graph passes do not know: sizes are fixed and folded before.

    Returns:
        The layers that are multiplied with, each once.
    """
    inner = graph.model.graph
    layers: dict[str, bool] = {}
    for node in list(inner):
        x, value = node.inputs[:2] if node.op_type == "MatMul" else (None, None)
        if x is None or value is None or value.name not in planned:
            continue
        name = str(value.name)
        layers[name.removesuffix(".dense")] = True
        replace_nodes(inner, node, product(inner, x, name.removesuffix(".dense"), planned[name]))
        if not value.uses():
            del inner.initializers[name]
    return tuple(layers)


def coded(weight: Array, planned: QuantizedWeight | None, bits: Bits, per_tensor: bool = False) -> Coded:
    """A weight [K, N] in codes of at most `bits` bits.

    Args:
        planned: what the plan has of it, None for a weight that it left in float.
        bits: 4 is for what the plan has in 4 bits or fewer; all else takes 8.
        per_tensor: one scale for all of it.
    """
    fmt = None if planned is None else WEIGHT_FORMATS[planned.format]
    narrow: Bits = 4 if bits == 4 and fmt is not None and fmt.bits <= 4 else 8
    if planned is not None and fmt is not None and not per_tensor and _is_channel_grid(planned, fmt):
        scale = planned.scale.float().numpy()[:, 0].copy()
        return Coded(codes=_across(planned.codes), scale=scale, bits=narrow, kept=True)
    grid = SymmetricInteger(name=f"int{narrow}", bits=narrow, group_size=None)
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    slabs = rows.reshape(1, -1) if per_tensor else rows
    scales = grid.fit_scale(slabs)
    codes = grid.round(slabs, scales).reshape(rows.shape).to(torch.int8)
    return Coded(codes=_across(codes), scale=scales.flatten().numpy(), bits=narrow, kept=False)


def _is_channel_grid(weight: QuantizedWeight, fmt: WeightFormat) -> bool:
    return fmt.symmetric and weight.scale.shape[1] == 1 and weight.codes.dtype == torch.int8


def _across(rows: Tensor) -> Array:
    return np.ascontiguousarray(rows.numpy().T)
