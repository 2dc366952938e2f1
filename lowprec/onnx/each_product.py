"""One way to write the product with a planned weight, put into the place of all of them."""

from collections.abc import Callable, Mapping
from functools import partial

import onnx_ir as ir

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph
from lowprec.onnx.places import find_places, in_two_widths, replace_product

Product = Callable[[ir.Graph, ir.Value, str, QuantizedWeight], list[ir.Node]]


def replace_products(graph: Graph, solved: Mapping[str, QuantizedWeight], product: Product) -> tuple[str, ...]:
    """Puts `product` of each planned weight [N, K] into the place of what multiplies with it, in place.

    Args:
        product: graph, x [..., K], name and weight -> nodes, the last of which gives x W^T [..., N]; rows of two
            widths are two of them. One name is one constant.

    Returns:
        The layers that are multiplied with; an embedding alone is not.

    Raises:
        UnsupportedError: planned layers that are not where they should be, or that `product` refuses.
    """

    def parts(inner: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
        if isinstance(WEIGHT_FORMATS[weight.format], MixedRows):
            return in_two_widths(inner, x, layer, weight, parts)
        try:
            return product(inner, x, layer, weight)
        except UnsupportedError as error:
            raise UnsupportedError(f"{layer}: {error}", error.reasons) from error

    found = find_places(graph, solved)
    for layer, place in found.items():
        for node in place.products:
            replace_product(graph.model.graph, node, partial(parts, layer=layer, weight=solved[layer]))
    return tuple(layer for layer, place in found.items() if place.products)
