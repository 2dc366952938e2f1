"""The ops against float64 over the same operands, every registered kernel by one contract, and the clock."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowprec_kernels import cpu, kernel, ops, reference, slow, timing
from lowprec_kernels.kernel import Kernel, Operands, kernels_for, registered
from lowprec_kernels.packing import pack_int4, unpack_int4

SHAPES = [(1, 16, 32), (3, 33, 96), (17, 48, 128), (2, 1, 32), (0, 16, 64)]
TOLERANCE = 1e-2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def _positive(*shape: int, seed: int = 0) -> Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) / 64 + 1 / 128
    return values.to(torch.bfloat16).to(torch.float32)


def operands(
    weight: str, n: int, k: int, group: int = 32, *, bias: bool = True, static: bool = False, by_rows: bool = False
) -> Operands:
    """Random operands of any kind; `by_rows`: INT4 that is INT8 with one scale for a row, too."""
    shared = {
        "bias": _random(n, seed=9).to(torch.bfloat16) if bias else None,
        "activation_scale": torch.tensor(0.02) if static else None,
    }
    if weight == "bf16":
        return Operands(weight="bf16", codes=_random(n, k, seed=1).to(torch.bfloat16), **shared)
    if weight == "int8":
        return Operands(weight="int8", codes=_int8(n, k, seed=1), scale=_positive(n, 1), **shared)
    if weight == "fp8":
        codes = (_random(n, k, seed=1) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Operands(weight="fp8", codes=codes, scale=_positive(n, 1), **shared)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scale, multiples = _positive(n, k // group), None
    if by_rows:
        multiples = torch.randint(1, 16, scale.shape, generator=generator, dtype=torch.int8)
        scale = multiples * (torch.randint(8, 16, (n, 1), generator=generator) / 1024)
    return Operands(weight="int4", codes=pack_int4(codes), scale=scale, group_size=group, multiples=multiples, **shared)


def relative_error(y: Tensor, truth: Tensor) -> float:
    return float((y.to(torch.float64) - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "largest", "code"), [("int8", 127, torch.int8), ("fp8", 448, torch.float8_e4m3fn)])
def test_quantisation_per_token(name: str, largest: int, code: torch.dtype, dtype: torch.dtype) -> None:
    x = (_random(6, 40) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    x[2] = 0
    codes, scale = ops.OPS[f"quantize_per_token_{name}"](x)
    assert codes.dtype == code
    assert (scale.shape, scale.dtype) == ((6, 1), torch.float32)
    values = codes.to(torch.float64)
    assert float(values.abs().max()) == largest
    assert bool((values[2] == 0).all())
    # Half a step of the grid: absolute for integers; for e4m3 2^-4 of the value or half its smallest subnormal.
    ideal = x.to(torch.float64) / scale.to(torch.float64)
    step = torch.full_like(ideal, 0.5) if name == "int8" else (ideal.abs() * 2**-4).clamp_min(2**-10)
    assert bool(((values - ideal).abs() <= step * (1 + 1e-5)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(name: str, bad: float) -> None:
    x = _random(4, 32)
    x[1, 5] = bad
    weight = operands("int8" if name == "int8" else "fp8", 16, 32)
    codes, scale = ops.OPS[f"quantize_per_token_{name}"](x)
    y = ops.OPS[f"w8a8_{name}_gemm"](codes, scale, weight.codes, weight.scale, None, torch.float32)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (4, 8, 1000)])
def test_int8_sums_are_exact(m: int, n: int, k: int) -> None:
    x, w = _int8(m, k, seed=1), _int8(n, k, seed=2)
    x[:1], w[:1] = 127, -127
    exact = x.to(torch.int64) @ w.to(torch.int64).t()
    assert torch.equal(reference.accumulate_int8(x, w).to(torch.int64), exact)
    ones = torch.ones(max(m, n), 1)
    y = ops.w8a8_int8_gemm(x, ones[:m], w, ones[:n], None, torch.float64)
    assert torch.equal(y.to(torch.int64), exact)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemms_against_float64(m: int, n: int, k: int, out_dtype: torch.dtype, with_bias: bool) -> None:
    x = _random(m, k, seed=4).to(out_dtype)
    xi, si = ops.quantize_per_token_int8(x)
    xf, sf = ops.quantize_per_token_fp8(x)
    bias = _random(n, seed=5) if with_bias else None
    w8, f8, w4 = operands("int8", n, k), operands("fp8", n, k), operands("int4", n, k)
    dense8 = w8.codes.double() * w8.scales().double()
    densef = f8.codes.double() * f8.scales().double()
    dense4 = (unpack_int4(w4.codes, k).double().view(n, -1, 32) * w4.scales().double()[..., None]).view(n, k)
    ints, floats = xi.double() * si.double(), xf.double() * sf.double()
    cases = [
        (ops.w8a8_int8_gemm(xi, si, w8.codes, w8.scale, bias, out_dtype), ints @ dense8.t()),
        (ops.w8a8_fp8_gemm(xf, sf, f8.codes, f8.scale, bias, out_dtype), floats @ densef.t()),
        (ops.w8a16_gemm(x, w8.codes, w8.scale, bias), x.double() @ dense8.t()),
        (ops.w4a16_gemm(x, w4.codes, w4.scale, bias, 32), x.double() @ dense4.t()),
        (ops.w4a8_int8_gemm(xi, si, w4.codes, w4.scale, bias, 32, out_dtype), ints @ dense4.t()),
        (ops.w4a8_fp8_gemm(xf, sf, w4.codes, w4.scale, bias, 32, out_dtype), floats @ dense4.t()),
    ]
    for y, product in cases:
        truth = product if bias is None else product + bias.double()
        assert (y.shape, y.dtype) == ((m, n), out_dtype)
        assert relative_error(y, truth) <= (1e-6 if out_dtype == torch.float32 else 2.0**-8)


@pytest.mark.parametrize("group", [8, 32, 64, 128])
def test_every_group_size_and_strided_inputs(group: int) -> None:
    m, n, k = 3, 16, 256
    w = operands("int4", n, k, group, bias=False)
    wide = _random(m, 2 * k, seed=6)
    dense = (unpack_int4(w.codes, k).double().view(n, -1, group) * w.scales().double()[..., None]).view(n, k)
    y = ops.w4a16_gemm(wide[:, ::2], w.codes.t().contiguous().t(), w.scale, None, group)
    assert relative_error(y, wide[:, ::2].double() @ dense.t()) < 1e-6
    codes, scale = ops.quantize_per_token_int8(wide[:, ::2])
    grouped = ops.w4a8_int8_gemm(codes, scale, w.codes, w.scale, None, group, torch.float32)
    assert relative_error(grouped, (codes.double() * scale.double()) @ dense.t()) < 1e-6


def _label(k: Kernel) -> str:
    return f"{k.weight}-{k.activation}-{k.name}-{k.device}"


ON_CPU = [k for k in registered() if k.device in ("cpu", "any")]


@pytest.mark.parametrize("k_", ON_CPU, ids=_label)
def test_kernel_contract(k_: Kernel) -> None:
    ran = 0
    group = 32
    for (m, n, k), dtype, static in itertools.product(SHAPES, (torch.float32, torch.bfloat16), (False, True)):
        if static and k_.activation is None:
            continue
        weight = operands(k_.weight, n, k, group, static=static, bias=n != 48, by_rows=k_.by_rows)
        reason = k_.supports(m, n, k, weight.group_size)
        if reason is not None:
            assert len(reason) > 10
            continue
        ran += 1
        x = _random(m, 2 * k, seed=7).to(dtype)[:, ::2]
        before = weight.codes.clone()
        y = k_.run(k_.prepare(weight), x)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        assert relative_error(y, slow.linear64(weight, k_.activation, x)) <= TOLERANCE
        assert torch.equal(weight.codes.view(torch.uint8), before.view(torch.uint8))
    assert ran or k_.supports(1, 16, 32, group) is not None


@pytest.mark.parametrize("pair", slow.KERNELS, ids=lambda k: f"{k.weight}-{k.activation}")
def test_the_reference_is_the_same_whatever_rows_are_taken_at_a_time(
    pair: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = operands(pair.weight, 22, 64, 32, static=False, bias=True, by_rows=False)
    x = _random(3, 64, seed=7)
    whole = slow.linear64(weight, pair.activation, x)
    monkeypatch.setattr(slow, "ROWS_AT_ONCE", 8)
    assert torch.equal(slow.linear64(weight, pair.activation, x), whole)
    assert whole.shape == (3, 22)


def _off_the_line(tensor: Tensor) -> Tensor:
    """The same values eight bytes behind a cache line, as a tensor that is memory-mapped from a file may lie."""
    room = torch.zeros(tensor.nbytes + 72, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 8
    placed = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


@pytest.mark.parametrize("k_", ON_CPU, ids=_label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_take_tensors_from_anywhere(k_: Kernel, dtype: torch.dtype) -> None:
    weight = operands(k_.weight, 48, 128, by_rows=k_.by_rows)
    if k_.supports(8, 48, 128, weight.group_size) is None:
        x = _random(8, 128, seed=7).to(dtype)
        placed = dataclasses.replace(weight, codes=_off_the_line(weight.codes))
        assert torch.equal(k_.run(k_.prepare(placed), _off_the_line(x)), k_.run(k_.prepare(weight), x))


@pytest.mark.parametrize("k_", ON_CPU, ids=_label)
def test_kernel_survives_extremes(k_: Kernel) -> None:
    n, k = 16, 512
    if k_.supports(2, n, k, 32) is not None:
        pytest.skip(str(k_.supports(2, n, k, 32)))
    weight = operands(k_.weight, n, k, bias=False, by_rows=k_.by_rows)
    largest = {"int8": 127, "fp8": 448, "bf16": 3.0}.get(k_.weight)
    if largest is None:
        extreme = pack_int4(torch.full((n, k), -8, dtype=torch.int8))
    else:
        extreme = torch.full((n, k), largest, dtype=torch.float32).to(weight.codes.dtype)
    weight = dataclasses.replace(weight, codes=extreme, bias=None)
    # Opposite signs within a row: saturating sums of pairs would show.
    x = torch.stack([torch.full((k,), 5.0), torch.full((k,), -5.0), torch.zeros(k), torch.ones(k)])
    x[3, ::2] = -0.5
    y = k_.run(k_.prepare(weight), x)
    assert relative_error(y, slow.linear64(weight, k_.activation, x)) <= TOLERANCE
    assert bool((y[2] == 0).all())
    if k_.activation is not None:
        x[0, 0] = float("nan")
        y = k_.run(k_.prepare(weight), x)
        assert bool(y[0].isnan().all())
        assert bool(y[1:].isfinite().all())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("activation", [None, "int8", "fp8"])
def test_int4_kernels_take_every_group_size(activation: str | None, group: int) -> None:
    x = _random(5, 256)
    for form in kernels_for("int4", activation, "cpu").values():
        weight = operands("int4", 32, 256, group, by_rows=form.by_rows)
        assert form.supports(5, 32, 256, group) is None
        y = form.run(form.prepare(weight), x)
        assert relative_error(y, slow.linear64(weight, form.activation, x)) <= TOLERANCE


@pytest.mark.parametrize("name", ["qlinear-u8", "qlinear-split", "int-mm", "dequantize-fp32"])
def test_integer_forms_sum_exactly(name: str) -> None:
    form = kernels_for("int8", "int8", "cpu")[name]
    if form.supports(4, 16, 512) is not None:
        pytest.skip(str(form.supports(4, 16, 512)))
    x, w = _int8(4, 512, seed=1), _int8(16, 512, seed=2)
    x[0], w[0], x[1] = 127, 127, -127
    weight = Operands(weight="int8", codes=w, scale=torch.ones(16, 1), activation_scale=torch.tensor(1.0))
    y = form.run(form.prepare(weight), x.to(torch.float32))
    assert torch.equal(y.to(torch.int32), reference.accumulate_int8(x, w))


def test_large_matrices_are_dequantised_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = operands("int4", 50, 64), _random(3, 64)
    form = kernels_for("int4", None, "cpu")["dequantize-fp32"]
    whole = form.run(form.prepare(weight), x)
    monkeypatch.setattr(cpu, "BLOCK_WEIGHTS", 64 * 7)
    torch.testing.assert_close(form.run(form.prepare(weight), x), whole, rtol=1e-6, atol=1e-6)


def test_codes_by_rows_are_made_in_blocks_and_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = operands("int4", 50, 64, by_rows=True, bias=False), _random(3, 64)
    form = kernels_for("int4", "int8", "cpu")["int-mm-rows"]
    whole = form.run(form.prepare(weight), x)
    monkeypatch.setattr(cpu, "BLOCK_WEIGHTS", 64 * 7)
    assert torch.equal(form.run(form.prepare(weight), x), whole)
    with pytest.raises(ValueError, match="multiples of a step"):
        form.prepare(operands("int4", 50, 64))


def test_fake_quantised_codes_match_the_op() -> None:
    x = _random(5, 64) * 3
    for kind in ("int8", "fp8"):
        codes, scale = kernel.quantize_activation(x, kind, None)
        truth, true_scale = ops.OPS[f"quantize_per_token_{kind}"](x)
        assert torch.equal(codes, truth.to(torch.float32))
        assert torch.equal(scale, true_scale)


def test_kernels_refuse_other_weights_and_empty_shapes() -> None:
    form = kernels_for("int8", None, "cpu")["int8pack"]
    with pytest.raises(ValueError, match="not bf16"):
        form.prepare(operands("bf16", 16, 32))
    assert "empty" in str(form.supports(1, 0, 32))
    pack = kernels_for("int4", None, "cpu")["int4pack"]
    assert "multiple of 16" in str(pack.supports(1, 17, 32, 32))
    assert "groups" in str(pack.supports(1, 16, 48, 48))


def test_every_pair_of_formats_has_a_slow_form_that_calls_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {(k.weight, k.activation) for k in registered()}
    assert pairs == {("bf16", None), *ops.GEMMS}
    assert set(ops.GEMMS.values()) < set(ops.OPS)
    called: list[str] = []
    for name, gemm in list(reference.REFERENCES.items()):
        monkeypatch.setitem(reference.REFERENCES, name, lambda *a, name=name, f=gemm: called.append(name) or f(*a))
    # On a GPU the ops are the kernels that the slow forms are the truth of.
    monkeypatch.setattr(ops, "OPS", {})
    for weight, activation in pairs:
        form = kernels_for(weight, activation, "cpu")["reference"]
        form.run(form.prepare(operands(weight, 16, 32, by_rows=form.by_rows)), _random(2, 32))
        assert weight == "bf16" or called[-1] == ops.GEMMS[weight, activation]


class FakeClock:
    """A clock that only candidates move."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def test_clock_interleaves_rotates_and_reports_percentiles() -> None:
    clock, calls = FakeClock(), []

    def candidate(name: str, micros: list[int]) -> object:
        def run(copy: int) -> None:
            calls.append((name, copy))
            mine = sum(1 for n, _ in calls if n == name) - 2
            clock.now += 1000 * micros[mine % len(micros)]

        return run

    found = timing.time_interleaved(
        {"a": candidate("a", [1, 2, 3, 4, 5]), "b": candidate("b", [10])},
        copies=2,
        seconds_per_candidate=0.0,
        min_runs=5,
        clock_ns=clock,
    )
    assert (found["a"].p20_us, found["a"].p50_us, found["a"].p80_us) == (1.8, 3.0, 4.2)
    assert found["b"].p50_us == 10.0
    assert found["a"].runs == found["b"].runs == 5
    after_warmup = calls[2:]
    assert [copy for _, copy in after_warmup] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert [name for name, _ in after_warmup[:4]] == ["a", "b", "b", "a"]


def test_clock_stops_in_time_and_at_the_most_runs() -> None:
    clock = FakeClock()

    def second(copy: int) -> None:
        clock.now += 10**9

    assert timing.time_interleaved({"a": second}, seconds_per_candidate=7.5, min_runs=2, clock_ns=clock)["a"].runs == 8
    limited = timing.time_interleaved({"a": second}, seconds_per_candidate=9e9, max_runs=3, clock_ns=clock)
    assert limited["a"].runs == 3
    waits: list[int] = []
    timing.time_interleaved({"a": second}, max_runs=2, synchronize=lambda: waits.append(1), clock_ns=clock)
    assert len(waits) == 3


def test_copies_put_four_caches_in_rotation_within_the_limit() -> None:
    assert timing.copies_for(1 << 20, cache_bytes=32 << 20) == 128
    assert timing.copies_for(3 << 20, cache_bytes=32 << 20) == 43
    assert timing.copies_for(1 << 30, cache_bytes=32 << 20) == 1
    assert timing.copies_for(1 << 20, cache_bytes=512 << 20, limit_bytes=64 << 20) == 64
    assert timing.copies_for(1.0, cache_bytes=32 << 20) == timing.MAX_COPIES
    assert timing.copies_for(0.0, cache_bytes=0) == 1


def test_cache_size_is_that_of_the_highest_level(tmp_path: Path) -> None:
    for index, (level, size) in enumerate([("1", "32K"), ("3", "8M"), ("2", "512K")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(level + "\n")
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert timing.last_level_cache_bytes(tmp_path) == 8 << 20
    assert timing.last_level_cache_bytes(tmp_path / "none") == timing.DEFAULT_CACHE_BYTES
