"""onnxruntime's own form: its operators compute what the codes say, and the fused graphs what the canonical ones do."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import tiny
from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.onnx.graph import OPSET
from lowprec.onnx.nbits import EXACT, FAST, AccuracyLevel, blocks_of, matmul_nbits, merged, refuses_nbits
from lowprec.onnx.session import open_session, run_session

NBITS = sorted(name for name in WEIGHT_FORMATS if refuses_nbits(name) is None)


def product(weight: QuantizedWeight, level: AccuracyLevel, folder: Path, bias: Tensor | None = None) -> Path:
    """A file that multiplies x [R, K] with a weight."""
    n, k = weight.codes.shape
    x = ir.Value(name="x", shape=ir.Shape((None, k)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET, "com.microsoft": 1}, name="product")
    added = None
    if bias is not None:
        added = ir.Value(name="bias", const_value=ir.tensor(bias.numpy(), name="bias"))
        graph.register_initializer(added)
    graph.extend(matmul_nbits(graph, x, "layer", weight, level, added))
    y = graph[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape((None, n))
    graph.outputs.append(y)
    ir.save(ir.Model(graph, ir_version=10), folder / "product.onnx")
    return folder / "product.onnx"


def rounded_by_block(x: Tensor, size: int) -> Tensor:
    """[R, K] rounded to INT8, each block of `size` columns by its own absolute maximum."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp_min(1e-30)).round() * scale).view(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("fmt", NBITS)
@pytest.mark.parametrize("k", [128, 576])
def test_matmul_nbits_multiplies_with_the_very_codes(fmt: str, k: int, tmp_path: Path) -> None:
    if WEIGHT_FORMATS[fmt].fits(k):
        pytest.skip(f"{fmt} does not fit {k}")
    torch.manual_seed(0)
    weight, bias = tiny.rounded(torch.randn(24, k), fmt), torch.randn(24)
    session = open_session(product(weight, EXACT, tmp_path), threads=1)
    # One-hot rows pick single weights.
    assert torch.equal(run_session(session, {"x": torch.eye(k)})[0].T, weight.dequantize())
    x = torch.randn(5, k)
    added = open_session(product(weight, EXACT, tmp_path, bias), threads=1)
    torch.testing.assert_close(run_session(added, {"x": x})[0], x @ weight.dequantize().T + bias, rtol=0, atol=1e-4)
    fast = run_session(open_session(product(weight, FAST, tmp_path), threads=1), {"x": x})[0]
    expected = rounded_by_block(x, blocks_of(fmt).size) @ weight.dequantize().T
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-4)
    assert not np.allclose(fast, x @ weight.dequantize().T, atol=1e-2), "a scheme of its own"


def test_weights_that_share_an_input_become_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = [tiny.rounded(torch.randn(n, 128), "int4-g64-asym") for n in (16, 8, 8)]
    session = open_session(product(merged(parts), EXACT, tmp_path), threads=1)
    whole = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(run_session(session, {"x": torch.eye(128)})[0].T, whole)
    with pytest.raises(ValueError, match="no rows in common"):
        merged([parts[0], tiny.rounded(torch.randn(16, 128), "int8")])


def test_weights_that_matmul_nbits_does_not_take_are_named() -> None:
    assert "floating point" in str(refuses_nbits("fp8"))
    assert "two products" in str(refuses_nbits("int4-g64-rows25"))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="none")
    with pytest.raises(UnsupportedError, match="fp8 are no operand of MatMulNBits"):
        matmul_nbits(graph, ir.Value(name="x"), "layer", tiny.rounded(torch.randn(8, 32), "fp8"), EXACT)
