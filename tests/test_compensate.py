"""Asymmetric calibration, the pass that compensates, and healing, on tiny models against what they promise."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lowprec.artifacts.folder import RunFolder
from lowprec.errors import ConfigError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, resolve, scheme_named
from lowprec.records import Scheme
from lowprec.solvers import SOLVERS, LayerStatistics
from lowprec.solvers.asymmetric import retargeted
from lowprec.solvers.latent import LARGEST_OFFSET, latent_codes
from lowprec.solvers.two_sided import ROWS
from lowprec.steps.backward import backward
from lowprec.steps.calibrate import Calibration, Gather
from lowprec.steps.compensate import Compensation
from lowprec.steps.graph import find_groups
from lowprec.steps.heal import Healing
from lowprec.steps.importance import token_importance
from lowprec.steps.learn import Learning
from lowprec.steps.linear import weight_of
from lowprec.steps.load import decoder_forward, sentence_forward
from lowprec.steps.measure import compare, compare_tokens, compare_vectors, mean_kl, run_through
from lowprec.steps.outcome import Outcome, Tokens, Vector
from lowprec.steps.scratch import Scratch
from lowprec.steps.solve import Rounder, overlay_of
from lowprec.steps.stream import Stream, products_of
from lowprec.steps.tokens import Batch

UNQUANTISED = scheme_named("bf16")


def batches(count: int, seed: int, rows: int = 8, length: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.full((rows,), length)
    return [
        Batch(ids=torch.randint(0, tiny.WORDS, (rows, length), generator=generator), lengths=shapes, index=())
        for _ in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path) as opened:
        yield opened


class Lab:
    """A tiny model, rounded in one scheme, and the KL of a rounding on text that nothing was fitted to."""

    def __init__(
        self, folder: RunFolder, scheme: str, model: Any, solver: str = "gptq-quick", skip: str = "", fused: bool = True
    ) -> None:
        decoder = hasattr(model, "lm_head")
        self.forward = decoder_forward if decoder else sentence_forward
        self.outcome: Outcome = Tokens() if decoder else Vector()
        self.by = compare_tokens if decoder else compare_vectors(None)
        self.stream = Stream(model, self.forward, batches(1, 0)[0])
        self.groups = find_groups(self.stream, fused=fused)[0]
        self.schemes: dict[str, Scheme] = {
            g.name: UNQUANTISED if skip and skip in g.name else resolve(scheme_named(scheme), g.k) for g in self.groups
        }
        self.folder = folder
        self.rounder = Rounder(self.stream, self.groups, self.folder, {}, solver)
        self.common: dict[str, Any] = {
            "stream": self.stream,
            "groups": self.groups,
            "schemes": self.schemes,
            "batches": batches(12, 1),
            "outcome": self.outcome,
            "calibration": Calibration(amax=(), batches=12),
        }
        self.unseen = batches(4, 2)

    def compensated(self, learning: Learning | None = None) -> dict[str, QuantizedWeight]:
        name = "lab" if learning is None else f"learned-{learning.steps}-{learning.seed}"
        common = {**self.common, "learning": learning, "rounder": self.rounder, "folder": self.folder}
        compensation = Compensation(**common, inputs={}, name=name)
        return compensation.run(Scratch(self.folder.path / "work", name))

    def plain(self) -> dict[str, QuantizedWeight]:
        return {
            layer: SOLVERS["rtn"].solve(weight_of(self.stream.layers[layer]).float(), WEIGHT_FORMATS[fmt], None)
            for g in self.groups
            if (fmt := self.schemes[g.name].weight)
            for layer in g.layers
        }

    def kl(self, solved: dict[str, QuantizedWeight], on: Sequence[Batch] | None = None) -> float:
        on = on or self.unseen
        overlay = overlay_of(self.groups, self.schemes, solved, self.common["calibration"])
        reference, changed = run_through(self.stream, on), run_through(self.stream, on, overlay)
        return mean_kl(compare(reference, [changed], on, self.by)[0])


def inputs(tokens: int, k: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64)
    before = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mixing
    return before, before + noise * torch.randn(tokens, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0])
def test_the_new_target_is_where_the_gradient_vanishes(ridge: float) -> None:
    before, x = inputs(400, 12, 0.5)
    w = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, drift = x.T @ x / len(x), (before - x).T @ x / len(x)
    v = retargeted(w, LayerStatistics(hessian=h, tokens=len(x), drift=drift), ridge).requires_grad_()
    objective = (before @ w.T - x @ v.T).square().sum() / len(x) + ridge * h.diagonal().mean() * (v - w).square().sum()
    (gradient,) = torch.autograd.grad(objective, v)
    assert gradient.abs().max() < 1e-9 * objective.item()


def test_without_drift_the_target_is_the_weight() -> None:
    w = torch.randn(3, 4)
    assert retargeted(w, None) is w
    assert retargeted(w, LayerStatistics(hessian=torch.eye(4), tokens=1)) is w
    none = LayerStatistics(hessian=torch.eye(4), tokens=1, drift=torch.zeros(4, 4))
    assert torch.equal(retargeted(w, none), w)
    unseen = LayerStatistics(hessian=torch.zeros(4, 4), tokens=1, drift=torch.zeros(4, 4))
    assert retargeted(w, unseen) is w


def test_a_drift_of_another_layer_is_refused() -> None:
    wrong = LayerStatistics(hessian=torch.eye(4), tokens=1, drift=torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"K = 4.*\(3, 3\)"):
        retargeted(torch.randn(3, 4), wrong)


@pytest.mark.parametrize("name", [*tiny.DECODERS, "bert"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-int8-g32"])
def test_compensated_rounding_loses_less_on_unseen_text(name: str, scheme: str, folder: RunFolder) -> None:
    lab = Lab(folder, scheme, tiny.encoder() if name in tiny.ENCODERS else tiny.decoder(name))
    assert lab.kl(lab.compensated()) < 0.8 * lab.kl(lab.plain())


def test_eight_bits_make_up_for_four_bits_before_them(folder: RunFolder) -> None:
    """The head rounded in INT8 mends what INT4 has done to its input, though INT8 itself loses nothing."""
    lab = Lab(folder, "w4a16-g32", tiny.decoder("llama-untied"))
    lab.schemes["lm_head"] = scheme_named("w8a16")
    solved = lab.compensated()
    as_it_was = {**solved, "lm_head": lab.plain()["lm_head"]}
    assert lab.kl(solved, lab.common["batches"]) < 0.97 * lab.kl(as_it_was, lab.common["batches"])


def test_what_stays_bfloat16_is_not_touched(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder(), skip="mlp")
    assert not any("mlp" in layer for layer in lab.compensated())


def test_a_module_without_a_cut_is_compensated_and_healed(folder: RunFolder) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).eval()
    data = [torch.randn(64, 64) for _ in range(6)]
    stream = Stream(module, lambda m, x: m(x), data[0])
    groups = find_groups(stream)[0]
    schemes = {g.name: scheme_named("w4a16-g32") for g in groups}
    common: dict[str, Any] = {"stream": stream, "groups": groups, "schemes": schemes, "batches": data}
    common |= {"outcome": Vector(), "calibration": Calibration(amax=(), batches=6)}
    rounder = Rounder(stream, groups, folder, {}, "gptq-quick")
    solved = Compensation(**common, rounder=rounder, folder=folder, inputs={}, name="m").run(
        Scratch(folder.path / "work", "m")
    )

    def loss(weights: dict[str, QuantizedWeight]) -> float:
        unseen = [torch.randn(64, 64, generator=torch.Generator().manual_seed(9))]
        runs = [
            run_through(stream, unseen, o) for o in ({}, overlay_of(groups, schemes, weights, common["calibration"]))
        ]
        return mean_kl(compare(runs[0], [runs[1]], unseen, compare_vectors(None))[0])

    assert loss(Healing(**common, passes=4).run(solved)) < loss(solved)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int3-g32", "int6"])
def test_a_latent_is_the_best_place_of_a_weight_among_the_others(name: str) -> None:
    w, (_, x) = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), inputs(400, 64, 0.5)
    hessian = (x.T @ x / len(x)).float()
    weight = SOLVERS["gptq-quick"].solve(w, WEIGHT_FORMATS[name], LayerStatistics(hessian=hessian, tokens=len(x)))
    latent = latent_codes(w, weight, hessian, 0.0)
    assert torch.equal(latent.round(), weight.codes.float())
    for n, j in [(0, 3), (2, 40), (4, 63)]:
        rounded = weight.dequantize().double()
        rounded[n, j] = float(latent[n, j] * weight.scale[n, j * weight.scale.shape[1] // 64])
        rounded.requires_grad_()
        error = w.double() - rounded
        (gradient,) = torch.autograd.grad((error @ hessian.double() * error).sum(), rounded)
        at_the_edge = float((latent - weight.codes).abs()[n, j]) >= LARGEST_OFFSET
        assert at_the_edge or abs(float(gradient[n, j])) < 1e-3 * float(hessian.diagonal().mean())


class Blocks(nn.Module):
    """Two blocks, wide enough for directions to add up; nothing stands before them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 128] -> [B, 128]."""
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("solver", ["rtn", "gptq-quick"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w4a8-int8-g32", "w3a16-g32"])
def test_learned_rounding_loses_less_and_never_more(scheme: str, solver: str, folder: RunFolder) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 128, generator=generator)
    data = [
        torch.randn(256, 12, generator=generator) @ mixing + 0.3 * torch.randn(256, 128, generator=generator)
        for _ in range(20)
    ]
    stream = Stream(Blocks().eval(), lambda module, x: module(x), data[0])
    assert stream.depth == 2
    groups, calibration = find_groups(stream)[0], Calibration(amax=(), batches=16)
    schemes = {g.name: scheme_named(scheme) for g in groups}
    common: dict[str, Any] = {"stream": stream, "groups": groups, "schemes": schemes, "batches": data[:16]}
    common |= {"outcome": Vector(), "calibration": calibration, "folder": folder, "inputs": {}}

    def solved(learning: Learning | None) -> dict[str, QuantizedWeight]:
        rounder = Rounder(stream, groups, folder, {}, solver)
        compensation = Compensation(**common, rounder=rounder, name=str(learning), learning=learning)
        return compensation.run(Scratch(folder.path / "work", str(learning)))

    def loss(weights: dict[str, QuantizedWeight]) -> float:
        overlay = overlay_of(groups, schemes, weights, calibration)
        reference, rounded = (run_through(stream, data[16:], o) for o in ({}, overlay))
        return mean_kl(compare(reference, [rounded], data[16:], compare_vectors(None))[0])

    before, after = solved(None), solved(Learning(rate=0.01, scale_rate=1e-3))
    assert loss(after) < (0.7 if solver == "rtn" else 1.001) * loss(before)
    for weight in after.values():
        assert WEIGHT_FORMATS[weight.format].refuses(weight) is None
        assert torch.equal(weight.scale, weight.scale.bfloat16().float()), "as it will be stored"
    wild = solved(Learning(steps=30, rate=0.5, scale_rate=0.5))
    assert all(torch.equal(wild[layer].codes, before[layer].codes) for layer in before), "harm is undone"


def test_eight_bits_are_not_learned_but_stay_in_the_block(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    lab.schemes = {g.name: scheme_named("w8a8-int8") if "mlp" in g.name else lab.schemes[g.name] for g in lab.groups}
    lab.common["schemes"] = lab.schemes
    learned = lab.compensated(Learning(steps=10))
    assert all(weight.format == ("int8" if "mlp" in layer else "int4-g32") for layer, weight in learned.items())


def test_a_cut_search_reads_back_what_it_had_learned(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    one, two = (lab.compensated(Learning(steps=10)) for _ in range(2))
    assert all(torch.equal(one[layer].codes, two[layer].codes) for layer in one)
    other = Lab(folder, "w4a16-g32", tiny.decoder()).compensated(Learning(steps=10, seed=0))
    assert all(torch.equal(one[layer].scale, other[layer].scale) for layer in one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-int8-g32"])
def test_healing_changes_scales_alone_and_loses_less(name: str, scheme: str, folder: RunFolder) -> None:
    lab = Lab(folder, scheme, tiny.decoder(name))
    solved = lab.compensated()
    healed = Healing(**lab.common, passes=6).run(solved)
    assert lab.kl(healed, lab.common["batches"]) < lab.kl(solved, lab.common["batches"])
    for layer, weight in healed.items():
        assert torch.equal(weight.codes.view(torch.uint8), solved[layer].codes.view(torch.uint8))
        assert torch.equal(weight.scale, weight.scale.bfloat16().float()), "as it will be stored"
    assert any(not torch.equal(healed[layer].scale, solved[layer].scale) for layer in solved)


def test_the_divergence_and_its_gradient_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    output, reference = (torch.randn(3, 50, 40, generator=generator) for _ in range(2))
    batch = Batch(ids=torch.zeros(3, 50, dtype=torch.long), lengths=torch.tensor([50, 31, 44]), index=(0, 1, 2))
    output.requires_grad_()
    found = Tokens().divergence(reference, output, batch)
    q, p = (x[batch.mask()].log_softmax(-1) for x in (output, reference))
    wanted = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert torch.allclose(found, wanted, rtol=1e-5)
    one, two = (torch.autograd.grad(x * 0.5, output)[0] for x in (found, wanted))
    assert torch.allclose(one, two, atol=1e-6)


def test_healing_is_the_same_every_time(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    solved = lab.compensated()
    one, two = (Healing(**lab.common, passes=1, seed=3).run(solved) for _ in range(2))
    assert all(torch.equal(one[layer].scale, two[layer].scale) for layer in solved)


def test_parts_of_a_pass_go_through_parts_of_the_text(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    count = len(lab.common["batches"])
    for passes, wanted in ((0.5, (count + 1) // 2), (1, count), (2, 2 * count)):
        steps = Healing(**lab.common, passes=passes)._steps()
        positions = [position for step in steps for position in step]
        assert len(positions) == wanted
        assert len(set(positions)) == min(wanted, count), "each once before any comes again"
    solved = lab.compensated()
    healed = Healing(**lab.common, passes=0.5, rate=10.0).run(solved)
    assert any(not torch.equal(healed[layer].scale, solved[layer].scale) for layer in solved)


def test_no_pass_heals_nothing(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    solved = lab.compensated()
    healed = Healing(**lab.common, passes=0).run(solved)
    assert all(torch.equal(healed[layer].scale, solved[layer].scale) for layer in solved)


def test_products_of_bfloat16_values_are_exact_and_the_precision_is_put_back() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    before = torch.get_float32_matmul_precision()
    with products_of(torch.bfloat16):
        found = torch.zeros(32, 32).addmm_(x.T, x)
    assert torch.get_float32_matmul_precision() == before
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    y = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    with products_of(torch.float32):
        torch.testing.assert_close((y.T @ y).double(), y.double().T @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_weigh_as_their_gradients_say(name: str) -> None:
    stream = Stream(tiny.decoder(name), decoder_forward, batches(1, 0)[0])
    groups, _ = find_groups(stream)
    some = batches(2, 3)
    products: dict[str, list[Tensor]] = {}
    found = token_importance(stream, groups, some, Tokens(), 4, lambda g, d: products.setdefault(g.name, list(d)))
    inside = [g for g in groups if g.block is not None]
    assert set(found) == {g.name for g in inside}
    group = next(g for g in inside if g.block == 1)
    model = tiny.decoder(name).float()
    generator, squares, outer = torch.Generator().manual_seed(4), {}, [torch.zeros(())] * len(group.layers)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(4)).tolist()
    for position in order:
        batch = some[position]
        outputs: list[Tensor] = []
        handles = [
            model.get_submodule(layer).register_forward_hook(lambda m, a, y, o=outputs: o.append(y))
            for layer in group.layers
        ]
        likelihood = Tokens().sampled_log_likelihood(model(batch.ids).logits, batch, generator)
        gradients = torch.autograd.grad(likelihood, outputs)
        squares[position] = torch.stack([g.square().mean(-1) for g in gradients]).sum(0) * batch.mask()
        outer = [o + g.flatten(0, -2).T @ g.flatten(0, -2) for o, g in zip(outer, gradients, strict=True)]
        for handle in handles:
            handle.remove()
    flat = torch.cat([squares[p][b.mask()] for p, b in enumerate(some)])
    expected = (flat / flat.mean()).clamp(0.05, 20).sqrt()
    weights = torch.cat([w[b.mask()] for w, b in zip(found[group.name], some, strict=True)])
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-4)
    # The pass computes in bfloat16 where that is fast, and so may draw other labels here and there.
    assert float(torch.corrcoef(torch.stack([weights, expected / expected.mean()]))[0, 1]) > 0.9
    for known, wanted in zip(products[group.name], outer, strict=True):
        assert float(torch.corrcoef(torch.stack([known.flatten(), wanted.flatten()]))[0, 1]) > 0.9
        assert float(known.trace() / wanted.trace()) == pytest.approx(1.0, rel=0.2)


def test_what_is_known_of_outputs_is_gathered_over_some_tokens_of_drawn_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(tiny.decoder(), decoder_forward, batches(1, 0)[0])
    groups, _ = find_groups(stream)
    some = batches(8, 3)
    real = [int(batch.mask().sum()) for batch in some]
    monkeypatch.setattr("lowprec.steps.importance.OUTPUT_TOKENS", sum(real) // 3)
    drawn = torch.randperm(8, generator=torch.Generator().manual_seed(4)).tolist()
    wanted = next(n for n in range(1, 9) if sum(real[p] for p in drawn[:n]) >= sum(real) // 3)
    passed: list[list[Batch]] = []

    def backward_of(stream: Stream, given: list[Batch], *rest: Any) -> None:
        passed.append(list(given))
        backward(stream, given, *rest)

    monkeypatch.setattr("lowprec.steps.importance.backward", backward_of)
    kept: list[str] = []
    found = token_importance(stream, groups, some, Tokens(), 4, lambda g, _: kept.append(g.name))
    assert sorted(kept) == sorted(g.name for g in groups if g.block is not None), "each once"
    assert [id(batch) for batch in passed[0]] == [id(some[p]) for p in drawn[:wanted]]
    assert sorted(id(batch) for given in passed for batch in given) == sorted(map(id, some))
    for weights in found.values():
        assert [w.shape for w in weights] == [batch.ids.shape for batch in some], "in the order of the text"


def test_outputs_of_wide_layers_are_known_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(tiny.decoder(), decoder_forward, batches(1, 0)[0])
    groups, _ = find_groups(stream)
    found: list[dict[str, list[Tensor]]] = []
    for rows in (2048, 48):
        monkeypatch.setattr("lowprec.steps.importance.OUTPUT_ROWS", rows)
        kept: dict[str, list[Tensor]] = {}
        token_importance(stream, groups, batches(2, 3), Tokens(), 4, lambda g, d, k=kept: k.setdefault(g.name, list(d)))
        found.append(kept)
    group = next(g for g in groups if g.block == 1)
    whole, parts = (kept[group.name] for kept in found)
    assert len(parts) > len(whole)
    torch.testing.assert_close(parts[0], whole[0][:48, :48])
    assert sum(map(len, parts)) == sum(map(len, whole))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pass_rounds_with_what_is_known_of_outputs(name: str, folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder(name))
    kept: dict[str, list[Tensor]] = {}
    common = {**lab.common, "rounder": lab.rounder, "folder": folder, "inputs": {}}
    token_importance(
        lab.stream, lab.groups, lab.common["batches"], Tokens(), 4, lambda g, d: kept.update({g.name: [*d]})
    )

    def solved(mix: str, known: Mapping[str, Sequence[Tensor]]) -> dict[str, QuantizedWeight]:
        compensation = Compensation(**common, name=mix, outputs=lambda group: known.get(group.name, ()))
        return compensation.run(Scratch(folder.path / "work", mix))

    alone, together = solved("alone", {}), solved("together", kept)
    differ = {layer for layer in alone if not torch.equal(alone[layer].codes, together[layer].codes)}
    first = {layer for g in lab.groups if g.block == 0 for layer in g.layers}
    # Rows of one block do not know of each other.
    assert {layer for layer in first if len(alone[layer].codes) > ROWS} <= differ
    start = next(g.layers for g in lab.groups if g.block == 0)
    assert not {layer for layer in start if len(alone[layer].codes) <= ROWS} & differ


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-int8-g32"])
def test_layers_that_no_runtime_fuses_are_rounded_as_if_they_were(tmp_path: Path, scheme: str) -> None:
    """They read one tensor, so each one's statistics are those of the group that they would form."""
    found, passes = [], []
    for fused in (True, False):
        with RunFolder(tmp_path / str(fused)) as place:
            lab = Lab(place, scheme, tiny.decoder(), fused=fused)
            block = lab.stream.module.get_submodule(lab.stream.block_names[0])
            count: list[int] = []
            handle = block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
            found.append(lab.compensated())
            handle.remove()
            passes.append(len(count))
    assert found[0].keys() == found[1].keys()
    for layer, weight in found[0].items():
        assert torch.equal(weight.codes, found[1][layer].codes), layer
        assert torch.equal(weight.scale, found[1][layer].scale), layer
    assert passes[0] == passes[1], "what is read together is gathered in one pass"


def test_one_sum_serves_all_that_read_one_tensor(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder(), fused=False)
    inside = [g for g in lab.groups if g.block == 0]
    gather = Gather(lab.stream, inside, 1)
    inputs: dict[int, torch.Tensor] = {}
    for number, group in enumerate(inside):
        x = inputs.setdefault(lab.stream.calls[group.layers[0]][0], torch.randn(3, group.k) + number)
        gather.add(group, x)
    assert len(gather.hessian) == len(inputs) < len(inside)
    for group in inside:
        x = inputs[lab.stream.calls[group.layers[0]][0]]
        torch.testing.assert_close(gather.statistics(group).hessian, x.T @ x / 3, rtol=1e-4, atol=1e-4)


def test_a_heavy_token_shapes_the_hessian(folder: RunFolder) -> None:
    lab = Lab(folder, "w4a16-g32", tiny.decoder())
    group = next(g for g in lab.groups if g.block == 0)
    some = lab.common["batches"]
    gather = Gather(lab.stream, [group], len(some))
    x = torch.randn(*some[0].ids.shape, group.k, generator=torch.Generator().manual_seed(0))
    gather.where = lab.outcome.positions(some[0])
    weights = torch.ones(some[0].ids.shape)
    weights[0, 2] = 9.0
    gather.importance = {group.name: [weights]}
    gather.add(group, x)
    found = gather.statistics(group)
    rows = x[some[0].mask()]
    expected = (rows.T @ rows + 8.0 * torch.outer(x[0, 2], x[0, 2])) / len(rows)
    torch.testing.assert_close(found.hessian, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_cut_has_no_weights() -> None:
    whole = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    stream = Stream(whole, lambda module, batch: module(batch), torch.randn(2, 8))
    assert token_importance(stream, find_groups(stream)[0], [torch.randn(2, 8)], Vector()) == {}
