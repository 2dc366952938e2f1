"""Contracts of every solver in every weight format, and GPTQ against a plain float64 one."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lowprec.errors import ConfigError, ModelError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, WeightFormat
from lowprec.formats.base import as_bfloat16
from lowprec.solvers import SOLVERS, LayerStatistics
from lowprec.solvers.base import fit_grid
from lowprec.solvers.gptq import Gptq, output_error, refit_scales
from lowprec.solvers.two_sided import OUTPUT_DAMPING, TwoSided, _Part

FORMATS = list(WEIGHT_FORMATS)
ALL = list(SOLVERS)


class Layer(NamedTuple):
    w: Tensor
    statistics: LayerStatistics

    @property
    def hessian(self) -> Tensor:
        return self.statistics.hessian


def layer(n: int = 48, k: int = 256, seed: int = 0, tokens: int = 1024) -> Layer:
    """Heavy-tailed weights; activations of low rank plus noise, with outlier channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    w = normal(n, k) * (1 + normal(n, k).abs()) * 0.02
    x = normal(tokens, 24) @ normal(24, k) + 0.5 * normal(tokens, k)
    x *= torch.exp(0.7 * normal(k))
    x[:, torch.randperm(k, generator=generator)[:3]] *= 20
    return Layer(w, LayerStatistics(hessian=x.T @ x / tokens, tokens=tokens))


def trace_error(w: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """trace(E H E^T) in float64, written out."""
    e = w.double() - quantized.dequantize().double()
    return float(torch.trace(e @ hessian.double() @ e.T))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("solver", ALL)
def test_contract(solver: str, name: str) -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS[name], layer()
    given = w.clone(), statistics.hessian.clone()
    found = SOLVERS[solver].solve(w, fmt, statistics)
    assert torch.equal(w, given[0])
    assert torch.equal(statistics.hessian, given[1]), "inputs are left as they are"
    groups = w.shape[1] // (fmt.group_size or w.shape[1])
    assert found.format == name
    assert found.codes.shape == w.shape
    assert found.codes.dtype == fmt.code_dtype
    assert found.codes.is_contiguous()
    assert found.scale.shape == (len(w), groups)
    assert found.scale.dtype == torch.float32
    assert torch.equal(as_bfloat16(found.scale), found.scale)
    assert bool((found.scale > 0).all())
    if fmt.symmetric:
        codes = found.codes.to(torch.float32)
        assert torch.equal(fmt.round(codes, torch.ones(1)), codes), "codes lie on the grid"
    else:
        assert fmt.refuses(found) is None, "codes lie in a window"
    again = SOLVERS[solver].solve(w, fmt, statistics)
    assert torch.equal(again.scale, found.scale)
    assert torch.equal(again.codes.view(torch.int8), found.codes.view(torch.int8)), "the same result every time"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("solver", [name for name in ALL if SOLVERS[name].needs_statistics])
def test_statistics_beat_rounding_to_nearest(solver: str, name: str, seed: int) -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS[name], layer(seed=seed)
    errors = {s: trace_error(w, SOLVERS[s].solve(w, fmt, statistics), statistics.hessian) for s in ("rtn", solver)}
    assert errors[solver] < 0.7 * errors["rtn"]


@pytest.mark.parametrize("name", FORMATS)
def test_rounds_only_improve(name: str) -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS[name], layer()
    damped = statistics.hessian + Gptq().damping * statistics.hessian.diagonal().mean() * torch.eye(w.shape[1])
    errors = [trace_error(w, Gptq(rounds=r).solve(w, fmt, statistics), damped) for r in range(5)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[3] < 0.99 * errors[0]


def plain_gptq(
    w: Tensor, scale: Tensor, hessian: Tensor, fmt: WeightFormat, damping: float, ordered: bool
) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv 2210.17323, algorithm 1) with one column at a time, the inverse in full, all in float64.

    Returns the codes [N, K] and where the value rounded was so near to a tie that float32 cannot tell.
    """
    n, k = w.shape
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if ordered else torch.arange(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    rest = w.double()[:, order].clone()
    codes = torch.zeros(n, k, dtype=torch.float64)
    near_tie = torch.zeros(n, k, dtype=torch.bool)
    for j in range(k):
        s = scale[:, int(order[j]) // (k // scale.shape[1])].double()
        code = fmt.round(rest[:, j], s).double()
        nudge = 2e-4 * rest[:, j].abs() + 1e-3 * s
        near_tie[:, order[j]] = fmt.round(rest[:, j] + nudge, s) != fmt.round(rest[:, j] - nudge, s)
        codes[:, order[j]] = code
        error = (rest[:, j] - code * s) / upper[j, j]
        rest[:, j:] -= error[:, None] * upper[j, j:]
    return codes, near_tie


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", ["int4-g64", "int8", "fp8"])
@pytest.mark.parametrize("k", [192, 320])
def test_equals_plain_gptq(name: str, ordered: bool, k: int) -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS[name], layer(n=64, k=k, seed=3)
    found = Gptq(rounds=0, damping=0.01, activation_order=ordered).solve(w, fmt, statistics)
    codes, near_tie = plain_gptq(w, found.scale, statistics.hessian, fmt, 0.01, ordered)
    order = torch.argsort(statistics.hessian.diagonal(), descending=True, stable=True) if ordered else torch.arange(k)
    differs = (found.codes.to(torch.float64) != codes)[:, order]
    # A near tie may fall either way in float32, and all that follows in that row with it: only firsts are judged.
    first = differs.int().argmax(-1)
    hit = differs.any(-1)
    assert float(hit.double().mean()) < 0.25
    assert bool(near_tie[:, order].gather(1, first[:, None])[hit].all())
    assert float(near_tie.double().mean()) < 0.05
    expected = trace_error(
        w, QuantizedWeight(format=name, codes=codes.to(fmt.code_dtype), scale=found.scale), statistics.hessian
    )
    assert trace_error(w, found, statistics.hessian) == pytest.approx(expected, rel=0.02)


def test_activation_order_keeps_groups_in_place() -> None:
    # Static groups: the scales of GPTQ itself are those of the columns that stand together, whatever the order.
    fmt, (w, statistics) = WEIGHT_FORMATS["int4-g64"], layer()
    a = Gptq(rounds=0, activation_order=True).solve(w, fmt, statistics)
    b = Gptq(rounds=0, activation_order=False).solve(w, fmt, statistics)
    assert torch.allclose(a.scale, b.scale, rtol=0.1)
    assert float((a.scale == b.scale).double().mean()) > 0.99
    assert not torch.equal(a.codes, b.codes)


def test_scales_weigh_columns_by_what_their_error_costs() -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS["int4-g64"], layer()
    h = statistics.hessian.double()
    h = h + Gptq().damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    importance = (1 / torch.linalg.inv(h).diagonal()).float()
    found = Gptq(rounds=0).solve(w, fmt, statistics)
    assert float((found.scale == fit_grid(w, fmt, importance)[0]).double().mean()) > 0.99


@pytest.mark.parametrize("name", ["int4-g64", "int8"])
def test_refit_reaches_the_least_squares_scales(name: str) -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS[name], layer()
    rounded = SOLVERS["rtn"].solve(w, fmt, statistics)
    codes, h = rounded.codes.float(), statistics.hessian
    fitted = refit_scales(w, codes, rounded.scale, h)
    root = torch.linalg.cholesky(h.double() + 1e-9 * h.double().diagonal().mean() * torch.eye(len(h)))
    groups = fitted.shape[1]
    for row in range(0, len(w), 7):
        one_hot = torch.eye(groups, dtype=torch.float64).repeat_interleave(w.shape[1] // groups, 0)
        design = root.T @ (codes[row].double()[:, None] * one_hot)
        best = torch.linalg.lstsq(design, (root.T @ w[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(fitted[row].double(), best, rtol=0.01)


@pytest.mark.parametrize("solver", ALL)
def test_rows_are_independent(solver: str) -> None:
    w, statistics = layer(n=40)
    for name in ("int4-g64", "fp8"):
        whole = SOLVERS[solver].solve(w, WEIGHT_FORMATS[name], statistics).dequantize()
        part = SOLVERS[solver].solve(w[10:20], WEIGHT_FORMATS[name], statistics).dequantize()
        # Sums of another shape round differently, so a near tie may fall the other way.
        assert float((whole[10:20] - part).norm() / part.norm()) < 0.01


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, statistics = layer(n=40)
    fmt = WEIGHT_FORMATS["int4-g64"]
    whole = SOLVERS["rtn"].solve(w, fmt, statistics)
    errors = [output_error(w, SOLVERS["gptq"].solve(w, fmt, statistics), statistics.hessian)]
    monkeypatch.setattr("lowprec.solvers.base.CHUNK_WEIGHTS", 1000)
    monkeypatch.setattr("lowprec.solvers.gptq.ROWS_AT_ONCE", 7)
    assert torch.equal(SOLVERS["rtn"].solve(w, fmt, statistics).codes, whole.codes)
    errors.append(output_error(w, SOLVERS["gptq"].solve(w, fmt, statistics), statistics.hessian))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("dead", [slice(5, 9), slice(64, 128), slice(None)])
@pytest.mark.parametrize("solver", ALL)
def test_columns_that_calibration_never_saw(solver: str, dead: slice) -> None:
    w, statistics = layer()
    hessian = statistics.hessian.clone()
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    fmt = WEIGHT_FORMATS["int4-g64"]
    found = SOLVERS[solver].solve(w, fmt, LayerStatistics(hessian=hessian, tokens=9))
    # Rounded to nearest rather than dropped: other text may use them.
    error = (found.dequantize() - w)[:, dead].norm() / w[:, dead].norm()
    assert 0 < float(error) < 0.25


@pytest.mark.parametrize("solver", ALL)
def test_layers_with_nothing_in_them(solver: str) -> None:
    w, statistics = layer()
    w[3] = 0
    w[:, 64:128] = 0
    for name in FORMATS:
        found = SOLVERS[solver].solve(w, WEIGHT_FORMATS[name], statistics)
        assert not found.dequantize()[3].any()
        assert bool(found.dequantize().isfinite().all())


@pytest.mark.parametrize("solver", ALL)
def test_bfloat16_weights(solver: str) -> None:
    w, statistics = layer()
    fmt, half = WEIGHT_FORMATS["int4-g64"], w.to(torch.bfloat16)
    a, b = SOLVERS[solver].solve(half, fmt, statistics), SOLVERS[solver].solve(half.float(), fmt, statistics)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)


def test_rtn_without_statistics() -> None:
    w, _ = layer()
    for name in FORMATS:
        fmt = WEIGHT_FORMATS[name]
        found = SOLVERS["rtn"].solve(w, fmt, None)
        expected, lowest = fit_grid(w, fmt, None)
        assert torch.equal(found.scale, expected)
        wide = w.shape[1] // found.scale.shape[1]
        starts = None if lowest is None else lowest.repeat_interleave(wide, 1)
        assert torch.equal(found.codes.float(), fmt.round(w, expected.repeat_interleave(wide, 1), starts))


@pytest.mark.parametrize("solver", ALL)
def test_refusals(solver: str) -> None:
    w, statistics = layer()
    subject, fmt = SOLVERS[solver], WEIGHT_FORMATS["int4-g64"]
    if subject.needs_statistics:
        with pytest.raises(ConfigError, match="calibrate"):
            subject.solve(w, fmt, None)
    for bad in (torch.nan, torch.inf):
        damaged = w.clone()
        damaged[2, 3] = bad
        with pytest.raises(ModelError, match=r"weight .* has 1 values that are not finite"):
            subject.solve(damaged, fmt, statistics)
        damaged = statistics.hessian.clone()
        damaged[2, 3] = bad
        with pytest.raises(ModelError, match="Hessian"):
            subject.solve(w, fmt, LayerStatistics(hessian=damaged, tokens=1))
    with pytest.raises(ModelError, match="negative diagonal"):
        subject.solve(w, fmt, LayerStatistics(hessian=-statistics.hessian, tokens=1))
    with pytest.raises(ConfigError, match="K = 256"):
        subject.solve(w, fmt, LayerStatistics(hessian=torch.eye(8), tokens=1))
    with pytest.raises(ConfigError, match="two dimensions"):
        subject.solve(w[0], fmt, statistics)
    with pytest.raises(UnsupportedError, match="multiple of 64"):
        subject.solve(w[:, :100], fmt, LayerStatistics(hessian=torch.eye(100), tokens=1))


def test_damping_rises_until_the_hessian_can_be_factorised() -> None:
    w, statistics = layer()
    fmt, mean = WEIGHT_FORMATS["int4-g64"], statistics.hessian.diagonal().mean()
    dented = statistics.hessian - 0.2 * mean * torch.eye(256) + torch.diag(0.2 * mean * torch.ones(256))
    dented[:2, :2] = torch.tensor([[1.0, 1.2], [1.2, 1.0]]) * mean
    found = SOLVERS["gptq"].solve(w, fmt, LayerStatistics(hessian=dented, tokens=1))
    assert output_error(w, found, statistics.hessian) < 0.1
    hopeless = torch.full((256, 256), -5.0) + 6 * torch.eye(256)
    with pytest.raises(ModelError, match="not positive definite"):
        SOLVERS["gptq"].solve(w, fmt, LayerStatistics(hessian=hopeless, tokens=1))


def test_output_error() -> None:
    w, statistics = layer()
    exact = QuantizedWeight(format="int8", codes=torch.zeros(48, 256, dtype=torch.int8), scale=torch.ones(48, 1))
    assert output_error(w, exact, statistics.hessian) == pytest.approx(1.0)
    assert output_error(torch.zeros_like(w), exact, statistics.hessian) == 0.0
    found = SOLVERS["rtn"].solve(w, WEIGHT_FORMATS["int4-g64"], statistics)
    whole = float(torch.trace(w.double() @ statistics.hessian.double() @ w.double().T))
    expected = trace_error(w, found, statistics.hessian) / whole
    assert output_error(w, found, statistics.hessian) == pytest.approx(expected)


def outputs(n: int, seed: int = 0, rank: int = 12) -> Tensor:
    """D^T D of gradients [4 n, n] that nearly lie in few directions, as those behind a projection do."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(4 * n, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    d += 0.3 * torch.randn(4 * n, n, generator=generator)
    return d.T @ d / len(d)


def two_sided_error(w: Tensor, quantized: QuantizedWeight, hessian: Tensor, g: Tensor) -> float:
    """trace(G E H E^T) in float64, written out."""
    e = w.double() - quantized.dequantize().double()
    return float(torch.trace(g.double() @ e @ hessian.double() @ e.T))


@pytest.mark.parametrize("name", ["int4-g64", "int4-g32-asym", "int3-g64", "int6"])
@pytest.mark.parametrize("rows", [16, 50, 96])
def test_rows_that_make_up_for_each_other_reach_less_of_the_output(name: str, rows: int) -> None:
    fmt, (w, statistics), g = WEIGHT_FORMATS[name], layer(n=96), outputs(96)
    known = dataclasses.replace(statistics, outputs=(g,))
    alone = two_sided_error(w, Gptq().solve(w, fmt, statistics), statistics.hessian, g)
    together = two_sided_error(w, TwoSided(rows=rows).solve(w, fmt, known), statistics.hessian, g)
    # With all rows in one block nobody makes up for anybody.
    assert together < {16: 0.5, 50: 0.8, 96: 1.01}[rows] * alone
    assert rows < 96 or together > 0.99 * alone


def test_a_block_aims_at_what_all_rows_to_come_can_do_best() -> None:
    w, g = layer(n=32).w, outputs(32)
    damped = g.double() + OUTPUT_DAMPING * g.diagonal().mean() * torch.eye(32)
    order = torch.argsort(g.diagonal(), descending=True)
    rounded = _Part(w, g, TwoSided(rows=8))
    torch.testing.assert_close(rounded.target(0), w[order[:8]])
    for number in range(2):
        rounded.take(number, Gptq().solve(rounded.target(number), WEIGHT_FORMATS["int4-g64"], layer().statistics))
    before, after = order[:16], order[16:]
    error = w[before].double() - torch.cat([q.dequantize() for q in rounded._solved])
    best = w[after] + torch.linalg.solve(damped[after][:, after], damped[after][:, before] @ error)
    torch.testing.assert_close(rounded.target(2).double(), best[:8], rtol=1e-3, atol=1e-4)


def test_parts_of_a_group_do_not_make_up_for_each_other() -> None:
    fmt, (w, statistics) = WEIGHT_FORMATS["int4-g64"], layer(n=112)
    parts, known = w.split([80, 32]), (outputs(80, 1), outputs(32, 2))
    whole = TwoSided().solve(w, fmt, dataclasses.replace(statistics, outputs=known))
    alone = [
        TwoSided().solve(part, fmt, dataclasses.replace(statistics, outputs=(g,)))
        for part, g in zip(parts, known, strict=True)
    ]
    assert float((whole.codes == torch.cat([q.codes for q in alone])).float().mean()) > 0.995


def test_outputs_of_other_rows_are_refused() -> None:
    w, statistics = layer()
    with pytest.raises(ConfigError, match=r"N = 48 has Hessians of 40 \+ 9 outputs"):
        TwoSided().solve(
            w, WEIGHT_FORMATS["int4-g64"], dataclasses.replace(statistics, outputs=(outputs(40), outputs(9)))
        )
