"""The ops as torch sees them: schema, fake form, checks, and the launcher that each runs on a GPU."""

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from interpreter import DEVICE, INTERPRETED
from lowprec_kernels import custom_op, ops, reference, reference_moe
from lowprec_kernels.packing import pack_int4, unpack_int4

REFERENCES = reference.REFERENCES | reference_moe.REFERENCES
M, N, K, G, E = 5, 48, 192, 64, 3
# Rounding of bfloat16, which the results are in; e4m3 sums of a GPU's matrix unit keep about 14 bits.
TOLERANCE = 2**-7
ON_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a GPU and TRITON_INTERPRET=0")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).to(torch.bfloat16)


def _scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=_generator(seed)) / 64 + 1 / 128


def _int8(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(-127, 128, shape, generator=_generator(seed), dtype=torch.int8)


def _fp8(*shape: int, seed: int = 3) -> Tensor:
    return (_floats(*shape, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def _int4(*shape: int, seed: int = 4) -> Tensor:
    return torch.randint(-8, 8, shape, generator=_generator(seed), dtype=torch.int8)


def _dense() -> dict[str, dict[str, Any]]:
    x, bias, weight = _floats(M, K), _floats(N, seed=5), _floats(K, seed=6)
    int4 = {"w_packed": pack_int4(_int4(N, K)), "w_scale": _scales(N, K // G)}
    int8 = {"w_codes": _int8(N, K, seed=7), "w_scale": _scales(N, 1)}
    fp8 = {"w_codes": _fp8(N, K, seed=7), "w_scale": _scales(N, 1)}
    blocks = {"w_codes": fp8["w_codes"], "w_scale": _scales(1, 2)}
    xi = {"x_codes": _int8(M, K), "x_scale": _scales(M, 1, seed=8)}
    xf = {"x_codes": _fp8(M, K), "x_scale": _scales(M, 1, seed=8)}
    end = {"bias": bias, "out_dtype": torch.bfloat16}
    grouped = {"bias": None, "group_size": G, "out_dtype": torch.bfloat16}
    nested = {"w_base": int4["w_packed"], "w_residual": pack_int4(_int4(N, K, seed=9)), "w_scale": int4["w_scale"],
              "w_ratio": _int4(N, K // G, seed=12).abs() + 4}  # fmt: skip
    zero = _int4(N, K // G, seed=10)
    return {
        "quantize_per_token_int8": {"x": x},
        "quantize_per_token_fp8": {"x": x},
        "quantize_per_block_fp8": {"x": x},
        "rms_norm_quantize": {"x": x, "weight": weight, "eps": 1e-5, "kind": "int8"},
        "add_rms_norm_quantize": {
            "x": x, "residual": _floats(M, K, seed=11), "weight": weight, "eps": 1e-5, "kind": "fp8", "block": 128,
        },
        "silu_mul_quantize": {"x": _floats(M, 2 * K), "kind": "fp8", "block": None},
        "w8a8_int8_gemm": {**xi, **int8, **end},
        "w8a8_fp8_gemm": {**xf, **fp8, **end},
        "w8a8_fp8_block_gemm": {"x_codes": xf["x_codes"], "x_scale": _scales(M, 2), **blocks, **end},
        "w8a16_gemm": {"x": x, **int8, "bias": bias},
        "w4a16_gemm": {"x": x, **int4, "bias": bias, "group_size": G, "w_zero": zero},
        "w4a8_int8_gemm": {**xi, **int4, **grouped},
        "w4a8_fp8_gemm": {**xf, **int4, **grouped},
        "nested_gemm": {"x": x, **nested, "w_zero": zero, "bias": bias, "group_size": G, "level": 8},
    }  # fmt: skip


def _experts() -> dict[str, dict[str, Any]]:
    routing = {"offsets": torch.tensor([0, 4, 4, 6], dtype=torch.int32)}
    routing |= {"rows": torch.tensor([0, 3, 1, 2, 0, 4], dtype=torch.int32), "row_weight": _scales(6)}
    end = {**routing, "out_dtype": torch.bfloat16}
    x_scale, scale = _scales(M, 1), _scales(E, N, 1)
    fp8 = {"x_codes": _fp8(M, K), "x_scale": x_scale, "w_codes": _fp8(E, N, K, seed=7), "w_scale": scale}
    return {
        "moe_w8a8_int8_gemm": {
            "x_codes": _int8(M, K), "x_scale": x_scale, "w_codes": _int8(E, N, K, seed=7), "w_scale": scale, **end,
        },
        "moe_w8a8_fp8_gemm": {**fp8, **end},
        "moe_w8a8_fp8_block_gemm": {**fp8, "x_scale": _scales(M, 2), "w_scale": _scales(E, 1, 2), **end},
        "moe_w4a16_gemm": {
            "x": _floats(M, K), "w_packed": pack_int4(_int4(E, N, K)), "w_scale": _scales(E, N, K // G), **routing,
            "group_size": G,
        },
    }  # fmt: skip


OPERANDS = _dense() | _experts()
EVERY_OP = pytest.mark.parametrize("name", OPERANDS)


def _on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _results(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _assert_near(name: str, found: Any, wanted: Any) -> None:
    """Products within rounding; of codes few may be a step apart, since fused sums are taken in another order."""
    for y, truth in zip(_results(found), _results(wanted), strict=True):
        assert (y.shape, y.dtype) == (truth.shape, truth.dtype)
        a, b = y.double().cpu(), truth.double().cpu()
        if truth.dtype in (torch.int8, torch.float8_e4m3fn):
            step = 1 if truth.dtype == torch.int8 else b.abs() / 8 + 2**-9
            assert bool(((a - b).abs() <= step).all())
            assert float((a != b).double().mean()) <= (0.02 if name.startswith(("rms", "add", "silu")) else 0)
        else:
            assert float((a - b).norm() / b.norm()) <= TOLERANCE


def test_every_op_has_a_reference_a_launcher_and_operands_here() -> None:
    assert set(ops.OPS) == set(REFERENCES) == set(custom_op.CUDA) == set(OPERANDS)
    assert set(ops.OPS) | {"OPS", "GEMMS", "CUDA"} == set(ops.__all__)
    assert all(getattr(ops, name) is op for name, op in ops.OPS.items())


@EVERY_OP
def test_ops_pass_opcheck(name: str) -> None:
    # torch's schema check multiplies its inputs, which it cannot do with float8.
    values = OPERANDS[name]
    float8 = any(isinstance(v, Tensor) and v.dtype == torch.float8_e4m3fn for v in values.values())
    utils = ("test_faketensor",) if float8 else ("test_schema", "test_faketensor")
    assert torch.library.opcheck(ops.OPS[name], tuple(values.values()), test_utils=utils)
    assert torch.library.opcheck(ops.OPS[name], (), values, test_utils=utils)


@EVERY_OP
def test_ops_take_columns_of_any_stride_and_no_rows(name: str) -> None:
    values = OPERANDS[name]
    turned = {k: v.t().contiguous().t() if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in values.items()}
    torch.library.opcheck(ops.OPS[name], (), turned, test_utils=("test_faketensor",))
    _assert_near(name, ops.OPS[name](**turned), ops.OPS[name](**values))
    if not name.startswith("moe"):
        empty = {k: v[:0] if k in ("x", "x_codes", "x_scale", "residual") else v for k, v in values.items()}
        assert all(len(y) == 0 for y in _results(ops.OPS[name](**empty)))


@EVERY_OP
def test_ops_are_traced_whole(name: str) -> None:
    op, values = ops.OPS[name], OPERANDS[name]
    fixed = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def call(*given: Tensor) -> Any:
        return op(**dict(zip(tensors, given, strict=True)), **fixed)

    for mode in ("fake", "symbolic"):
        graph = make_fx(call, tracing_mode=mode)(*tensors.values())
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert f"lowprec.{name}.default" in targets
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    for y, truth in zip(_results(compiled(*tensors.values())), _results(op(**values)), strict=True):
        assert torch.equal(y.double(), truth.double())


@EVERY_OP
def test_launchers_take_what_the_ops_take(name: str) -> None:
    # The dispatcher leaves out trailing arguments that are the op's defaults: the launcher's must be equal.
    wanted = list(inspect.signature(REFERENCES[name]).parameters.values())
    given = list(inspect.signature(custom_op.launcher(name)).parameters.values())
    assert [(p.name, p.default) for p in given[: len(wanted)]] == [(p.name, p.default) for p in wanted]
    assert all(p.default is not inspect.Parameter.empty for p in given[len(wanted) :])
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowprec::{name}", "CUDA")


@EVERY_OP
def test_launchers_give_the_numbers_of_the_reference(name: str) -> None:
    values = [_on(DEVICE, v) for v in OPERANDS[name].values()]
    _assert_near(name, custom_op.launcher(name)(*values), REFERENCES[name](*OPERANDS[name].values()))


@ON_GPU
@EVERY_OP
def test_ops_on_a_gpu(name: str) -> None:
    values = {k: _on("cuda", v) for k, v in OPERANDS[name].items()}
    found = ops.OPS[name](**values)
    assert all(y.is_cuda for y in _results(found))
    _assert_near(name, found, REFERENCES[name](**OPERANDS[name]))
    first, *others = values.values()
    if any(isinstance(v, Tensor) for v in others):
        with pytest.raises(ValueError, match="several devices: cpu, cuda:0"):
            ops.OPS[name](first.cpu(), *others)


@ON_GPU
def test_what_a_launcher_does_not_take_is_no_reference_on_a_gpu() -> None:
    values = {k: _on("cuda", v) for k, v in OPERANDS["w4a16_gemm"].items()}
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        ops.w4a16_gemm(**values | {"x": values["x"].float()})


def test_without_triton_a_launcher_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    custom_op.launcher.cache_clear()
    with pytest.raises(RuntimeError, match=r"w4a16_gemm on a GPU needs triton.*pip install triton"):
        custom_op.launcher("w4a16_gemm")


# Op, the operand that is wrong, and what is said of it.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("quantize_per_token_int8", {"x": torch.zeros(K)}, r"x must be \[M, K\] float, not torch.float32 \(192,\)"),
    ("quantize_per_token_fp8", {"x": _int8(M, K)}, "not torch.int8"),
    ("quantize_per_token_fp8", {"x": torch.zeros(M, 0)}, "not K = 0"),
    ("quantize_per_block_fp8", {"block": 0}, "not 0"),
    ("rms_norm_quantize", {"weight": torch.zeros(K)}, r"weight must be \[192\] bfloat16, not torch.float32"),
    ("rms_norm_quantize", {"kind": "int4"}, "kind must be one of int8, fp8, not int4"),
    ("add_rms_norm_quantize", {"residual": _floats(M, 7)}, r"residual must be \[5, 192\] bfloat16, not .* \(5, 7\)"),
    ("silu_mul_quantize", {"x": _floats(M, 7)}, r"gate and up side by side.*\(5, 7\)"),
    ("w8a8_int8_gemm", {"x_codes": _fp8(M, K)}, "x_codes must be .* int8, not torch.float8_e4m3fn"),
    ("w8a8_int8_gemm", {"out_dtype": torch.int32}, "not torch.int32"),
    ("w8a8_fp8_gemm", {"w_codes": _fp8(N, 96)}, r"w_codes must be \[N, 192\].*\(48, 96\)"),
    ("w8a8_fp8_block_gemm", {"x_scale": _scales(M, 1)}, r"x_scale must be \[5, 2\].*\(5, 1\)"),
    ("w8a8_fp8_block_gemm", {"w_scale": _scales(N, 1)}, r"w_scale must be \[1, 2\].*\(48, 1\)"),
    ("w8a16_gemm", {"bias": torch.zeros(3)}, r"bias must be \[48\] float, not torch.float32 \(3,\)"),
    ("w8a16_gemm", {"w_scale": _floats(N, 1)}, "w_scale must be .* float32, not torch.bfloat16"),
    ("w4a16_gemm", {"group_size": 48 * 7}, "K = 192 is not made of groups of 336"),
    ("w4a16_gemm", {"w_packed": torch.zeros(N, 7, dtype=torch.int32)}, r"w_packed must be \[N, 24\].*\(48, 7\)"),
    ("w4a16_gemm", {"w_zero": _scales(N, K // G)}, "w_zero must be .* int8, not torch.float32"),
    ("w4a8_int8_gemm", {"w_scale": _scales(N, 2)}, r"w_scale must be \[48, 3\].*\(48, 2\)"),
    ("w4a8_fp8_gemm", {"x_scale": _scales(1, 1)}, r"x_scale must be \[5, 1\].*\(1, 1\)"),
    ("nested_gemm", {"w_ratio": _scales(N, K // G)}, r"w_ratio must be \[48, 3\] int8, not torch.float32"),
    ("nested_gemm", {"level": 5}, r"\(4, 8\), not 5"),
    ("nested_gemm", {"w_residual": torch.zeros(7, 24, dtype=torch.int32)}, r"w_residual must be \[48, 24\].*\(7, 24\)"),
    ("moe_w8a8_int8_gemm", {"offsets": torch.zeros(3, dtype=torch.int32)}, r"offsets must be \[4\].*\(3,\)"),
    ("moe_w8a8_fp8_gemm", {"rows": torch.zeros(6, dtype=torch.int64)}, r"rows must be \[T\] int32, not torch.int64"),
    ("moe_w8a8_fp8_block_gemm", {"w_scale": _scales(E, N, 1)}, r"w_scale must be \[3, 1, 2\].*\(3, 48, 1\)"),
    ("moe_w4a16_gemm", {"row_weight": torch.zeros(5)}, r"row_weight must be \[6\].*\(5,\)"),
]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_ops_refuse_what_does_not_fit(name: str, change: dict[str, Any], message: str, fake: bool) -> None:
    values = OPERANDS[name] | change
    if not fake:
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            ops.OPS[name](**values)
        return
    with FakeTensorMode() as mode:
        values = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            ops.OPS[name](**values)


def test_every_op_is_refused_something() -> None:
    assert {name for name, _, _ in WRONG} == set(ops.OPS)


def test_fake_operands_on_two_devices_are_refused() -> None:
    with FakeTensorMode():
        x, codes = torch.empty(M, K, device="cuda"), torch.empty(N, K, dtype=torch.int8)
        with pytest.raises(ValueError, match="several devices: cpu, cuda:0"):
            ops.w8a16_gemm(x, codes, torch.empty(N, 1), None)


def test_block_scaled_codes_stand_for_their_values() -> None:
    x = _floats(3, 300).float() * torch.logspace(-2, 2, 300)
    codes, scale = ops.quantize_per_block_fp8(x)
    restored = codes.float() * scale.repeat_interleave(128, 1)[:, :300]
    assert float((restored - x).norm() / x.norm()) < 0.04
    x[1, 200] = torch.nan
    assert ops.quantize_per_block_fp8(x)[1].isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
    # One block as long as the row is a scale per token.
    for found, wanted in zip(ops.quantize_per_block_fp8(x, 300), ops.quantize_per_token_fp8(x), strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


def test_products_of_blocks_against_decoded_operands() -> None:
    n, k = 130, 300
    x, w, x_scale, w_scale = _fp8(M, k), _fp8(n, k, seed=7), _scales(M, 3), _scales(2, 3)
    truth = torch.zeros(M, n, dtype=torch.float64)
    for row in range(n):
        for block in range(3):
            at = slice(128 * block, 128 * (block + 1))
            truth[:, row] += (x[:, at].double() @ w[row, at].double()) * x_scale[:, block] * w_scale[row // 128, block]
    y = ops.w8a8_fp8_block_gemm(x, x_scale, w, w_scale, None, torch.float64)
    torch.testing.assert_close(y, truth, rtol=1e-6, atol=0)


def test_levels_of_nested_weights() -> None:
    values = OPERANDS["nested_gemm"] | {"x": _floats(M, K).double(), "bias": None}
    base, rest = (unpack_int4(values[name], K).double() for name in ("w_base", "w_residual"))
    zero, scale = (values[name].double().repeat_interleave(G, 1) for name in ("w_zero", "w_scale"))
    ratio = values["w_ratio"].double().repeat_interleave(G, 1)
    coarse, fine = (base - zero) * scale, (ratio * (base - zero) + rest) * scale / ratio
    torch.testing.assert_close(ops.nested_gemm(**values), values["x"] @ fine.t())
    torch.testing.assert_close(ops.nested_gemm(**values | {"level": 4}), values["x"] @ coarse.t())


def test_fused_casts_are_their_parts() -> None:
    x, residual, weight = _floats(M, K), _floats(M, K, seed=1), _floats(K, seed=2)
    codes, scale, summed = ops.add_rms_norm_quantize(x, residual, weight, 1e-5, "int8")
    assert torch.equal(summed, x + residual)
    normed = torch.nn.functional.rms_norm(summed.float(), (K,), eps=1e-5).to(torch.bfloat16) * weight
    _assert_near("rms_norm_quantize", (codes, scale), ops.quantize_per_token_int8(normed))
    _assert_near("rms_norm_quantize", (codes, scale), ops.rms_norm_quantize(summed, weight, 1e-5, "int8"))
    gated = torch.nn.functional.silu(x) * residual
    _assert_near("silu", ops.silu_mul_quantize(torch.cat((x, residual), 1), "fp8"), ops.quantize_per_token_fp8(gated))
