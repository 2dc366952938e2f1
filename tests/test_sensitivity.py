"""Calibration and sensitivity: statistics, effects against autograd, prediction against measurement, resume."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lowprec.artifacts.folder import RunFolder
from lowprec.errors import ModelError
from lowprec.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, scheme_named
from lowprec.records import Group
from lowprec.solvers import SOLVERS, LayerStatistics
from lowprec.steps.calibrate import calibrate
from lowprec.steps.effects import LayerErrors
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import weight_of
from lowprec.steps.load import decoder_forward
from lowprec.steps.measure import compare, compare_tokens, mean_kl, measure_pairs, run_through
from lowprec.steps.outcome import Tokens, Vector
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import Effects, effects
from lowprec.steps.solve import Rounder
from lowprec.steps.stream import Override, Stream
from lowprec.steps.tokens import Batch

SCHEMES = [scheme_named(name) for name in ("w8a8-int8", "w8a16", "w4a16-g64", "w8a8-fp8")]


def batches(count: int = 3, length: int = 16) -> list[Batch]:
    """Windows of which the second row of each batch is shorter."""
    made = []
    for i in range(count):
        ids = tiny.batch(2, length, seed=i)
        ids[1, length - 4 :] = 0
        made.append(Batch(ids=ids, lengths=torch.tensor([length, length - 4]), index=(2 * i, 2 * i + 1)))
    return made


def built(module: nn.Module) -> tuple[Stream, tuple[Group, ...]]:
    stream = Stream(module, decoder_forward, batches(1)[0])
    return stream, find_groups(stream)[0]


def no_rounding(gathered: Sequence[tuple[Group, LayerStatistics]]) -> None:
    """Calibration for its statistics alone."""


def rtn_errors(stream: Stream) -> Any:
    def errors(layer: str, formats: Any) -> LayerErrors:
        weight = weight_of(stream.layers[layer]).float()
        rounded = [SOLVERS["rtn"].solve(weight, WEIGHT_FORMATS[f], None).dequantize() for f in formats]
        return LayerErrors(parts=torch.stack([r - weight for r in rounded]))

    return errors


def test_hessian_is_that_of_the_real_tokens(tmp_path: Path) -> None:
    stream, groups = built(tiny.decoder())
    data, found = batches(), {}
    result = calibrate(
        stream,
        groups,
        data,
        Tokens(),
        lambda all_: found.update({g.name: s for g, s in all_}),
        Scratch(tmp_path / "s", "d"),
        probing=1,
    )
    inputs: dict[str, list[Tensor]] = {}
    model = tiny.decoder().float()
    for group in groups:
        model.get_submodule(group.layers[0]).register_forward_pre_hook(
            lambda _, args, name=group.name: inputs.setdefault(name, []).append(args[0].detach())
        )
    for batch in data[:2]:
        decoder_forward(model, batch)
    for group in groups:
        rows = torch.cat([x[b.mask()] for x, b in zip(inputs[group.name], data[:2], strict=True)])
        expected = rows.T @ rows / len(rows)
        scale = expected.diagonal().mean()
        assert found[group.name].tokens == len(rows) == 2 * (16 + 12)
        torch.testing.assert_close(found[group.name].hessian / scale, expected / scale, rtol=0, atol=1e-4)
        assert dict(result.amax)[group.name] == pytest.approx(float(rows.abs().max()), rel=1e-4)


def test_nan_activations_name_the_layer_and_the_text(tmp_path: Path) -> None:
    model = tiny.decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    stream, groups = built(model)
    with pytest.raises(ModelError, match=r"layers\.1.*on the text page 7"):
        calibrate(stream, groups, batches(), Tokens(), no_rounding, Scratch(tmp_path, "d"), describe=lambda _: "page 7")


def test_nan_at_the_head_names_the_text_too(tmp_path: Path) -> None:
    model = tiny.decoder("llama-untied")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    stream, groups = built(model)
    with pytest.raises(ModelError, match=r"lm_head holds NaN.*on the text page 7"):
        calibrate(stream, groups, batches(), Tokens(), no_rounding, Scratch(tmp_path, "d"), describe=lambda _: "page 7")


def reference_effects(stream: Stream, group: Group, data: list[Batch], seed: int) -> Tensor:
    """<dW, gradient> of one w4a16 group by plain autograd, sequence by sequence."""
    model = tiny.decoder("llama-untied").float()
    layers = [model.get_submodule(name) for name in group.layers]
    for layer in layers:
        layer.weight.requires_grad_(True)
    effects_of = []
    for position, batch in enumerate(data):
        logits = decoder_forward(model, batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        drawn = torch.rand(int(batch.lengths.sum()), 1, generator=generator)
        flat = logits[batch.mask()]
        cumulative = flat.detach().softmax(-1).cumsum(-1)
        labels = torch.searchsorted(cumulative, drawn * cumulative[:, -1:]).squeeze(-1)
        logp = flat.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        start = 0
        for length in batch.lengths.tolist():
            row = logp[start : start + length].sum()
            start += length
            gradients = torch.autograd.grad(row, [layer.weight for layer in layers], retain_graph=True)
            errors = [rtn_errors(stream)(name, ["int4-g64"]).parts[0] for name in group.layers]
            effects_of.append(sum(float((g * e).sum()) for g, e in zip(gradients, errors, strict=True)))
    return torch.tensor(effects_of)


def scored(stream: Stream, groups: Any, tmp_path: Path, data: list[Batch], **kwargs: Any) -> Effects:
    scratch = Scratch(tmp_path, "d")
    done = calibrate(stream, groups, [*batches(1), *data], Tokens(), no_rounding, scratch, probing=len(data))
    schemes = {g.name: SCHEMES for g in groups}
    return effects(stream, groups, schemes, data, Tokens(), rtn_errors(stream), done, scratch, seed=3, **kwargs)


@pytest.mark.parametrize("role", ["qkv", "down", "lm_head"])
def test_effects_equal_autograd(tmp_path: Path, role: str) -> None:
    # Untied, as autograd's gradient of a tied head would include the embedding's.
    stream, groups = built(tiny.decoder("llama-untied"))
    data = batches()
    found = scored(stream, groups, tmp_path, data)
    group = next(g for g in groups if g.role == role)
    expected = reference_effects(stream, group, data, 3)
    # The errors are held in bfloat16.
    torch.testing.assert_close(
        found.of(group.name, scheme_named("w4a16-g64")).float(), expected, rtol=0.02, atol=0.02 * float(expected.std())
    )


def test_prediction_agrees_with_measurement(tmp_path: Path) -> None:
    stream, groups = built(tiny.decoder())
    data = [
        Batch(ids=tiny.batch(8, 32, seed=i), lengths=torch.full((8,), 32), index=tuple(range(8))) for i in range(12)
    ]
    found = scored(stream, groups, tmp_path, data)
    errors = rtn_errors(stream)
    for scheme in SCHEMES:
        overlay = {
            layer: Override(
                weight=lambda x=layer, s=scheme: errors(x, [s.weight]).parts[0] + weight_of(stream.layers[x]).float(),
                activation=scheme.activation,
            )
            for g in groups
            for layer in g.layers
        }
        measured = mean_kl(
            compare(run_through(stream, data), [run_through(stream, data, overlay)], data, compare_tokens)[0]
        )
        predicted = sum(found.kl(g.name, scheme)[0] for g in groups)
        assert predicted == pytest.approx(measured, rel=0.35), scheme.name


def test_a_pair_measured_alone_equals_the_whole_model(tmp_path: Path) -> None:
    stream, groups = built(tiny.decoder())
    data = batches()
    errors = rtn_errors(stream)
    overlays = {}
    for group in (groups[1], groups[6], groups[-1]):
        overlays[group.name, "w4a16-g64"] = {
            layer: Override(
                weight=lambda x=layer: errors(x, ["int4-g64"]).parts[0] + weight_of(stream.layers[x]).float()
            )
            for layer in group.layers
        }
    found = measure_pairs(stream, data, overlays, compare_tokens)
    for pair, overlay in overlays.items():
        table = compare(run_through(stream, data), [run_through(stream, data, overlay)], data, compare_tokens)[0]
        assert found[pair] == pytest.approx(mean_kl(table), rel=1e-3)


class Cut(Exception):
    """Ends a pass in the middle."""


def test_a_cut_pass_resumes_with_the_same_effects(tmp_path: Path) -> None:
    stream, groups = built(tiny.decoder())
    data = batches()
    whole = scored(stream, groups, tmp_path / "whole", data)

    def cut(done: int, total: int) -> None:
        if done == 2:
            raise Cut

    scratch = Scratch(tmp_path / "cut", "d")
    seen: list[str] = []
    arguments = (stream, groups, [*batches(1), *data], Tokens())
    with pytest.raises(Cut):
        calibrate(*arguments, lambda all_: seen.extend(g.name for g, _ in all_), scratch, probing=3, progress=cut)
    done = calibrate(*arguments, lambda all_: seen.extend(g.name for g, _ in all_), scratch, probing=3)
    assert seen == [g.name for g in groups], "no group is calibrated twice"
    schemes = {g.name: SCHEMES for g in groups}
    common = (stream, groups, schemes, data, Tokens(), rtn_errors(stream), done, scratch, 3)
    with pytest.raises(Cut):
        effects(*common, progress=cut)
    resumed = effects(*common)
    assert resumed.columns == whole.columns
    assert torch.equal(resumed.values, whole.values)


def test_vectors_are_scored_by_their_squared_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    data = [torch.randn(64, 64) for _ in range(40)]
    stream = Stream(model, lambda m, b: m(b), data[0][:1])
    groups, _ = find_groups(stream)
    scheme = scheme_named("w4a16-g64")
    errors = rtn_errors(stream)
    scratch = Scratch(tmp_path, "d")
    done = calibrate(stream, groups, data, Vector(), no_rounding, scratch)
    found = effects(stream, groups, {g.name: [scheme] for g in groups}, data, Vector(), errors, done, scratch, seed=0)
    for name, group in zip(("0", "2"), groups, strict=True):
        changed = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        changed.load_state_dict(model.state_dict())
        changed.get_submodule(name).weight.data += errors(name, ["int4-g64"]).parts[0]
        x = torch.cat(data)
        with torch.no_grad():
            measured = float(0.5 * (changed(x) - model(x)).square().sum(1).mean())
        predicted, stderr = found.kl(group.name, scheme)
        assert abs(predicted - measured) < 4 * stderr + 0.05 * measured


def test_rounding_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    found = []
    for workers in (1, 3):
        stream, groups = built(tiny.decoder())
        with RunFolder(tmp_path / str(workers)) as folder:
            rounder = Rounder(stream, groups, folder, {}, workers=workers)
            keep = partial(rounder.solve_and_keep, formats={g.name: ["int4-g64"] for g in groups})
            calibrate(stream, groups, batches(), Tokens(), keep, Scratch(tmp_path / f"s{workers}", "d"))
            found.append({n: rounder.rounded(n, "int4-g64") for g in groups for n in g.layers})
    for layer, weight in found[0].items():
        assert torch.equal(weight.codes, found[1][layer].codes)
        assert torch.equal(weight.scale, found[1][layer].scale)


def test_dynamic_activation_formats_are_all_scored() -> None:
    blocks = {f"int8-block{size}" for size in (128, 64, 32)}
    assert {n for n in ACTIVATION_FORMATS if ACTIVATION_FORMATS[n].dynamic} == {"int8-token", "fp8-token"} | blocks
