"""Tables of a vocabulary: rows of two widths, and one set of codes for an embedding and the head that is tied to it."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.artifacts.folder import RunFolder
from lowprec.artifacts.loading import read_back
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.safetensors_io import read_header
from lowprec.artifacts.source import weights_digest
from lowprec.errors import ArtifactError, ConfigError
from lowprec.formats import SCHEMES, WEIGHT_FORMATS, QuantizedWeight, scheme_named
from lowprec.formats.rows import FINE, MixedRows
from lowprec.records import Group, Scheme, Workload
from lowprec.runtime import KernelTable, convert_
from lowprec.runtime.table import QuantEmbedding, QuantHead
from lowprec.settings import Settings
from lowprec.steps.calibrate import Calibration, calibrate
from lowprec.steps.cost import candidates, group_costs, time_shapes
from lowprec.steps.effects import LayerErrors
from lowprec.steps.frequency import token_frequency
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import weight_of
from lowprec.steps.load import decoder_forward, sentence_forward
from lowprec.steps.measure import compare, compare_tokens, mean_kl, measure_pairs, run_through
from lowprec.steps.outcome import Tokens
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import Effects, effects
from lowprec.steps.solve import Rounder, overlay_of
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch, TokenSet
from lowprec.targets import TARGETS

ROWS = [name for name in WEIGHT_FORMATS if isinstance(WEIGHT_FORMATS[name], MixedRows)]
TIED = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "gemma3": "model.embed_tokens"}
EMBEDDING = "model.embed_tokens"
CALIBRATION = Calibration(amax=(), batches=1)


def mixed(name: str) -> MixedRows:
    found = WEIGHT_FORMATS[name]
    assert isinstance(found, MixedRows)
    return found


def weight(n: int = 32, k: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 2) -> list[Batch]:
    return [Batch(ids=tiny.batch(2, 16, i), lengths=torch.tensor([16, 16]), index=(0, 1)) for i in range(count)]


def built(name: str = "llama") -> tuple[Stream, tuple[Group, ...], Group]:
    stream = Stream(tiny.decoder(name), decoder_forward, batches(1)[0])
    groups, _ = find_groups(stream, embeddings=True)
    return stream, groups, groups[-1]


# Rows of two widths


@pytest.mark.parametrize("name", ROWS)
@given(seed=st.integers(0, 20), zeros=st.integers(0, 32))
def test_a_weight_comes_back_from_its_parts(name: str, seed: int, zeros: int) -> None:
    fmt, w = mixed(name), weight(seed=seed)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    w[torch.argsort(importance)[:zeros]] = 0.0
    whole = fmt.mixed(tiny.rounded(w, FINE), tiny.rounded(w, fmt.coarse), importance)
    assert fmt.refuses(whole) is None
    rows, fine, coarse = fmt.split(whole)
    assert len(fine.codes) == fmt.fine_rows(32)
    assert (fine.format, coarse.format) == (FINE, fmt.coarse)
    back = fmt.joined(rows, fine, coarse)
    assert torch.equal(back.codes, whole.codes)
    assert torch.equal(back.scale, whole.scale)
    assert torch.equal(back.dequantize()[rows], fine.dequantize())
    assert torch.equal(back.dequantize()[~rows], coarse.dequantize())


def test_the_rows_that_matter_are_the_fine_ones() -> None:
    fmt, w, importance = mixed("int4-g64-rows25"), weight(), torch.zeros(32)
    importance[[3, 7, 20]] = torch.tensor([3.0, 1.0, 2.0])
    whole = fmt.mixed(tiny.rounded(w, FINE), tiny.rounded(w, fmt.coarse), importance)
    error = (whole.dequantize() - w).square().mean(1)
    assert fmt.fine_rows(32) == 8
    assert set(error.argsort()[:3].tolist()) <= set(error.argsort()[:8].tolist())
    assert bool((error[[3, 7, 20]] < 1e-4).all())
    assert int((error < 1e-4).sum()) == 8


@pytest.mark.parametrize(
    "change", ["another row beyond INT4", "a fine row of two scales", "a code of INT8 that is -128"]
)
def test_what_is_no_such_weight_is_refused(change: str) -> None:
    fmt = mixed("int4-g64-rows25")
    whole = tiny.rounded(weight(), fmt.name)
    codes, scale = whole.codes.clone(), whole.scale.clone()
    if change.startswith("another"):
        codes[0, 0] = 100
    elif change.startswith("a fine"):
        scale[-1, 0] *= 2
    else:
        codes[-1, 0] = -128
    assert fmt.refuses(whole) is None
    assert fmt.refuses(QuantizedWeight(format=fmt.name, codes=codes, scale=scale)) is not None


# The graph, and what the model computes with


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_joins_the_head_when_it_is_to_be_shared(name: str) -> None:
    stream, _, head = built(name)
    assert head.tables == (TIED[name],)
    alone, unquantised = find_groups(stream)
    assert not any(group.tables for group in alone)
    assert TIED[name] in {u.name for u in unquantised}
    assert TIED[name] not in {u.name for u in find_groups(stream, embeddings=True)[1]}


def test_bytes_as_the_objective_round_embeddings_and_others_do_not() -> None:
    assert Settings(out=Path("x"), objective="bytes").rounds_embeddings
    assert not Settings(out=Path("x"), objective="time").rounds_embeddings
    assert Settings(out=Path("x"), objective="time", embeddings=True).rounds_embeddings
    assert not Settings(out=Path("x"), objective="bytes", embeddings=False).rounds_embeddings
    assert not Settings(out=Path("x"), objective="bytes").fuses, "no runtime that fuses reads tables in codes"
    assert Settings(out=Path("x"), objective="bytes", embeddings=False).fuses


def planned(groups: tuple[Group, ...], head: Group, scheme: str) -> dict[str, Scheme]:
    return {g.name: scheme_named(scheme if g is head else "bf16") for g in groups}


@pytest.mark.parametrize("name", TIED)
def test_embedding_and_head_compute_with_one_weight(name: str) -> None:
    stream, groups, head = built(name)
    solved = {"lm_head": tiny.rounded(stream.layers["lm_head"].weight.detach(), "int4-g64-rows12")}
    overlay = overlay_of(groups, planned(groups, head, "w4a16-g64-rows12"), solved, CALIBRATION)
    with stream.outer(overlay):
        assert stream.layers["lm_head"].weight is stream.tables[TIED[name]].weight
        assert torch.equal(stream.layers["lm_head"].weight, solved["lm_head"].dequantize())
    expected = tiny.decoder(name).float()
    expected.get_output_embeddings().weight.data.copy_(solved["lm_head"].dequantize())
    batch = batches(1)[0]
    run = run_through(stream, [batch], overlay)
    with stream.outer(overlay), torch.no_grad():
        found = stream.leave(run.hidden[0], batch)
        torch.testing.assert_close(found, expected(batch.ids).logits, rtol=1e-4, atol=1e-4)


def test_a_pair_with_a_table_is_measured_through_the_whole_model() -> None:
    stream, groups, head = built()
    solved = {"lm_head": tiny.rounded(stream.layers["lm_head"].weight.detach(), "int4-g64")}
    overlay = overlay_of(groups, planned(groups, head, "w4a16-g64"), solved, CALIBRATION)
    data = batches()
    found = measure_pairs(stream, data, {("lm_head", "w4a16-g64"): overlay}, compare_tokens)
    table = compare(run_through(stream, data), [run_through(stream, data, overlay)], data, compare_tokens)[0]
    assert found["lm_head", "w4a16-g64"] == pytest.approx(mean_kl(table), rel=1e-5)
    alone = {"lm_head": overlay["lm_head"]}
    head_only = measure_pairs(stream, data, {("lm_head", "w4a16-g64"): alone}, compare_tokens)
    assert head_only["lm_head", "w4a16-g64"] < 0.98 * found["lm_head", "w4a16-g64"], "the embedding's error counts"


@pytest.mark.parametrize("name", TIED)
def test_effects_of_head_and_table_are_the_gradient_of_the_tied_weight(name: str, tmp_path: Path) -> None:
    stream, _, head = built(name)
    data, scheme = batches(3), scheme_named("w4a16-g64")
    w = stream.layers["lm_head"].weight.detach().float()
    error = (tiny.rounded(w, "int4-g64").dequantize() - w).to(torch.bfloat16)

    def errors(layer: str, formats: Any) -> LayerErrors:
        shape = stream.layers[layer].weight.shape
        return LayerErrors(parts=error[None] if layer == "lm_head" else torch.zeros(1, *shape))

    scratch = Scratch(tmp_path / "s", "d")
    calibration = calibrate(stream, [head], data, Tokens(), lambda _: None, scratch, probing=2)
    found = effects(stream, [head], {"lm_head": (scheme,)}, data[1:], Tokens(), errors, calibration, scratch, seed=5)
    assert {kind for _, kind, _ in found.columns} == {"weight", "table"}
    model = tiny.decoder(name).float()
    tied = model.get_output_embeddings().weight
    for position, batch in enumerate(data[1:]):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + position)
        likelihood = Tokens().sampled_log_likelihood(model(batch.ids).logits, batch, generator)
        (gradient,) = torch.autograd.grad(likelihood, tied)
        together = found.of("lm_head", scheme)[2 * position : 2 * position + 2].sum()
        assert float(together) == pytest.approx(float((gradient * error.float()).sum()), rel=1e-3)


def test_rows_of_two_widths_are_scored_by_the_errors_of_the_formats_that_they_are_from(tmp_path: Path) -> None:
    stream, groups, head = built()
    data = batches(3)
    names = ("w8a16", "w4a16-g64", "w4a16-g64-rows12", "w4a16-g64-rows50")
    schemes = {"lm_head": tuple(scheme_named(name) for name in names)}
    importance = torch.rand(head.n, generator=torch.Generator().manual_seed(1))
    with RunFolder(tmp_path / "run") as folder:
        rounder = Rounder(stream, groups, folder, {}, solver="rtn", frequency={"lm_head": lambda: importance})
    by_rows = rounder.errors("lm_head", [str(scheme.weight) for scheme in schemes["lm_head"]])
    assert len(by_rows.parts) == 2, "INT8 and INT4: others take their rows from these"

    def whole(layer: str, formats: Any) -> LayerErrors:
        weight = weight_of(stream.layers[layer]).float()
        return LayerErrors(parts=torch.stack([rounder.rounded(layer, f).dequantize() - weight for f in formats]))

    def effects_with(errors: Any, place: str) -> Effects:
        scratch = Scratch(tmp_path / place, "d")
        calibration = calibrate(stream, [head], data, Tokens(), lambda _: None, scratch, probing=2)
        return effects(stream, [head], schemes, data[1:], Tokens(), errors, calibration, scratch, seed=5)

    found, expected = effects_with(rounder.errors, "a"), effects_with(whole, "b")
    assert found.columns == expected.columns
    assert len(found.columns) == 8
    # The errors are held in bfloat16.
    assert torch.allclose(found.values, expected.values, rtol=2e-2, atol=1e-4 * float(expected.values.abs().max()))
    assert len({tuple(column.tolist()) for column in found.values.T}) == 8


def test_frequency_is_the_mean_probability() -> None:
    stream, _, head = built()
    data = TokenSet(
        ids=tuple(tiny.batch(1, 16, i)[0] for i in range(4)), units=(0,) * 4, sources=(0,) * 4, documents=("d",) * 4,
        source_names=("s",),
    )  # fmt: skip
    found = token_frequency(stream, head, data)
    with torch.no_grad():
        logits = tiny.decoder()(torch.stack(data.ids)).logits
    expected = logits.float().softmax(-1).mean((0, 1))
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-3)
    assert float((found - expected).abs().sum()) < 0.05


def test_where_outputs_are_no_vocabulary_rows_matter_by_how_often_they_are_read() -> None:
    stream = Stream(tiny.encoder(), sentence_forward, batches(1)[0])
    words = next(g for g in find_groups(stream, embeddings=True)[0] if "word" in g.name)
    ids = torch.cat([torch.full((12,), 7), torch.full((4,), 9)])
    data = TokenSet(ids=(ids,), units=(0,), sources=(0,), documents=("d",), source_names=("s",))
    found = token_frequency(stream, words, data)
    assert found.nonzero().flatten().tolist() == [7, 9]
    assert found[[7, 9]].tolist() == [12, 4]


class Bag(nn.Module):
    """The mean of what is read, padding included, without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(tiny.WORDS, 64), nn.Linear(64, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, 4]."""
        return self.out(self.words(ids).mean(1))


@pytest.mark.parametrize("whole", [False, True])
def test_padding_is_not_read_and_a_model_without_blocks_reads_too(whole: bool) -> None:
    model, forward = (Bag(), lambda m, b: m(b.ids)) if whole else (tiny.encoder(), sentence_forward)
    stream = Stream(model, forward, batches(1)[0])
    assert stream.whole == whole
    words = next(g for g in find_groups(stream, embeddings=True)[0] if "word" in g.name)
    ids = (torch.tensor([7, 7, 9]), torch.tensor([9]))
    data = TokenSet(ids=ids, units=(0, 1), sources=(0, 0), documents=("d", "e"), source_names=("s",))
    assert len(data.batches()) == 1, "the shorter one is padded"
    found = token_frequency(stream, words, data)
    assert {row: int(found[row]) for row in found.nonzero().flatten().tolist()} == {7: 2, 9: 2}


# Embeddings that nothing is tied to


def untied() -> tuple[Stream, Group]:
    stream = Stream(tiny.decoder("llama-untied"), decoder_forward, batches(1)[0])
    return stream, find_groups(stream, embeddings=True)[0][0]


def test_an_untied_embedding_is_a_group_of_its_own() -> None:
    stream, group = untied()
    assert group.is_embedding
    assert (group.layers, group.tables) == ((EMBEDDING,), (EMBEDDING,))
    assert (group.n, group.k, group.block) == (tiny.WORDS, 64, None)
    assert EMBEDDING not in {u.name for u in find_groups(stream, embeddings=True)[1]}
    alone, unquantised = find_groups(stream)
    assert not any(g.is_embedding for g in alone)
    assert EMBEDDING in {u.name for u in unquantised}


def test_positions_are_not_read_by_tokens() -> None:
    stream = Stream(tiny.decoder("gpt2"), decoder_forward, batches(1)[0])
    assert stream.token_tables == ("transformer.wte",)
    assert not any(g.is_embedding for g in find_groups(stream, embeddings=True)[0])


@pytest.mark.parametrize("change", ["small", "rewritten"])
def test_embeddings_that_codes_do_not_suit_stay(change: str) -> None:
    model = tiny.decoder("llama-untied")
    if change == "small":
        model.model.embed_tokens = nn.Embedding(2, 64, dtype=torch.bfloat16)
        batch = Batch(ids=torch.ones(1, 8, dtype=torch.long), lengths=torch.tensor([8]), index=(0,))
    else:
        model.model.embed_tokens.max_norm = 1.0
        batch = batches(1)[0]
    groups, unquantised = find_groups(Stream(model, decoder_forward, batch), embeddings=True)
    assert not any(g.is_embedding for g in groups)
    assert EMBEDDING in {u.name for u in unquantised}


def test_an_embedding_is_offered_no_rounded_inputs_and_costs_no_time() -> None:
    _, group = untied()
    schemes = [scheme_named(s) for s in ("w8a16", "w8a8-int8", "w4a16", "w4a16-rows6")]
    widths = {group.name: (group.n,)}
    allowed, _ = candidates([group], widths, schemes, TARGETS["torch"])
    assert [s.name for s in allowed[group.name]] == ["bf16", "w8a16", "w4a16-g64", "w4a16-g64-rows6"]
    assert time_shapes([group], widths, allowed, Workload(), TARGETS["torch"]) == []
    costs = group_costs([group], widths, allowed, Workload(), [])
    assert {c.us for c in costs.values()} == {0.0}
    assert costs[group.name, "w8a16"].bytes == group.n * (group.k + 2)


def test_effects_of_an_embedding_are_the_gradient_of_its_weight(tmp_path: Path) -> None:
    stream, group = untied()
    data, scheme = batches(3), scheme_named("w4a16-g64")
    w = stream.tables[EMBEDDING].weight.detach().float()
    error = (tiny.rounded(w, "int4-g64").dequantize() - w).to(torch.bfloat16)
    scratch = Scratch(tmp_path / "s", "d")
    calibration = calibrate(stream, [group], data, Tokens(), lambda _: None, scratch, probing=2)
    errors = LayerErrors(parts=error[None])
    found = effects(
        stream, [group], {group.name: (scheme,)}, data[1:], Tokens(), lambda *_: errors, calibration, scratch, seed=5
    )
    model = tiny.decoder("llama-untied").float()
    for position, batch in enumerate(data[1:]):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + position)
        likelihood = Tokens().sampled_log_likelihood(model(batch.ids).logits, batch, generator)
        (gradient,) = torch.autograd.grad(likelihood, model.get_input_embeddings().weight)
        together = found.of(group.name, scheme)[2 * position : 2 * position + 2].sum()
        assert float(together) == pytest.approx(float((gradient * error.float()).sum()), rel=1e-3)


@pytest.mark.parametrize("fmt", ["int4-g64-rows25", "int4-g64", "int6", "int8"])
def test_an_embedding_with_codes_of_its_own_reads_them(fmt: str, tmp_path: Path) -> None:
    model = tiny.decoder("llama-untied")
    solved = {EMBEDDING: tiny.rounded(model.get_input_embeddings().weight.detach(), fmt)}
    scheme = next(s for s in SCHEMES.values() if s.weight == fmt and s.activation is None)
    write_own_form(
        tmp_path / "a", module=model, name="m", revision=weights_digest(model), solved=solved,
        schemes={EMBEDDING: scheme},
    )  # fmt: skip
    ids = tiny.batch(2, 12)
    loaded, _ = lowprec.load_artefact(tmp_path / "a")
    assert torch.equal(loaded.get_input_embeddings().weight, solved[EMBEDDING].dequantize())
    converted = lowprec.apply_artefact(model, tmp_path / "a", runtime=True)
    table = converted.get_submodule(EMBEDDING)
    assert isinstance(table, QuantEmbedding)
    assert torch.equal(table(ids), loaded.get_input_embeddings()(ids).to(torch.bfloat16))
    # Its codes are its own, so they are saved and moved with the model.
    assert any(name.startswith(f"{EMBEDDING}.table.") for name in converted.state_dict())


# The runtime


def tied_model(name: str, fmt: str, scheme: str) -> tuple[nn.Module, nn.Module]:
    """A model in our runtime, and one with the same weights dense."""
    model, dense = tiny.decoder(name), tiny.decoder(name).float()
    solved = {"lm_head": tiny.rounded(model.get_output_embeddings().weight.detach(), fmt)}
    dense.get_output_embeddings().weight.data.copy_(solved["lm_head"].dequantize())
    kinds = {"lm_head": scheme_named(scheme)}
    convert_(model, solved, kinds, kernels=KernelTable(), tables={"lm_head": [TIED[name]]})
    return model, dense


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize(
    ("fmt", "scheme"),
    [
        ("int4-g64-rows25", "w4a16-g64-rows25"),
        ("int4-g64", "w4a16-g64"),
        ("int6", "w6a16"),
        ("int8", "w8a16"),
        ("fp8", "w8a8-fp8"),
    ],
)
def test_the_runtime_answers_as_the_dense_model(name: str, fmt: str, scheme: str) -> None:
    model, dense = tied_model(name, fmt, scheme)
    embedding = model.get_submodule(TIED[name])
    assert isinstance(embedding, QuantEmbedding)
    ids = tiny.batch(2, 12)
    rows = embedding(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, dense.get_input_embeddings()(ids).to(torch.bfloat16))
    head = model.get_output_embeddings()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, dense.get_output_embeddings().weight)
        assert float((head(x) - expected).norm() / expected.norm()) < (0.05 if "w8a8" in scheme else 1e-2)
        truth = dense(ids).logits
        apart = model(ids).logits.float() - truth
    assert float(apart.norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_fewer_rows_may_be_read_than_the_padding_row_stands_at(name: str) -> None:
    model = tiny.decoder(name)
    table = model.get_input_embeddings()
    table.padding_idx = 17
    expected = tiny.rounded(table.weight.detach(), "int8").dequantize()[[5, 17]].to(torch.bfloat16)
    layer = "lm_head" if name == "llama" else EMBEDDING
    solved = {layer: tiny.rounded(table.weight.detach(), "int8")}
    tables = {layer: [EMBEDDING]}
    convert_(model, solved, {layer: scheme_named("w8a16")}, kernels="reference", tables=tables)
    assert torch.equal(model.get_input_embeddings()(torch.tensor([[5, 17]]))[0], expected)


def test_a_cast_moves_what_is_read_and_not_the_codes() -> None:
    model, _ = tied_model("llama", "int4-g64-rows12", "w4a16-g64-rows12")
    before = read_codes(model)
    model.float()
    assert model.get_submodule(TIED["llama"])(tiny.batch(1, 4)).dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(before, read_codes(model), strict=True))


def read_codes(model: nn.Module) -> list[Tensor]:
    head = model.get_submodule("lm_head")
    assert isinstance(head, QuantHead)
    return [part.operands().codes for part in head.parts]


def test_a_head_of_another_scheme_is_refused() -> None:
    whole = tiny.rounded(weight(), "int4-g64-rows25")
    with pytest.raises(ConfigError, match="rows12"):
        QuantHead(scheme_named("w4a16-g64-rows12"), whole, None, "reference")
    with pytest.raises(ConfigError, match="no embedding"):
        convert_(
            tiny.decoder(), {"lm_head": tiny.rounded(tiny.decoder().lm_head.weight, "int8")},
            {"lm_head": scheme_named("w8a16")}, kernels="reference", tables={"lm_head": ["model.norm"]},
        )  # fmt: skip


# The artefact


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("scheme", ["w4a16-g64-rows6", "w6a16", "w8a16"])
def test_a_table_is_stored_once_and_comes_back_tied(name: str, scheme: str, tmp_path: Path) -> None:
    model = tiny.decoder(name)
    solved = {"lm_head": tiny.rounded(model.get_output_embeddings().weight.detach(), str(scheme_named(scheme).weight))}
    written = write_own_form(
        tmp_path / "a", module=model, name="m", revision=weights_digest(model), solved=solved,
        schemes={"lm_head": scheme_named(scheme)}, tables={"lm_head": (TIED[name],)},
    )  # fmt: skip
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    table = solved["lm_head"].codes.numel() * 2
    rest = before - table
    per_row = WEIGHT_FORMATS[solved["lm_head"].format].bytes_per_row(64)
    assert written.weight_bytes == pytest.approx(rest + per_row * tiny.WORDS, abs=tiny.WORDS)
    assert f"{TIED[name]}.weight" not in read_header(tmp_path / "a" / "lowprec.safetensors").tensors
    back = read_back(tmp_path / "a")["lm_head"]
    assert torch.equal(back.codes, solved["lm_head"].codes)
    assert torch.equal(back.scale, solved["lm_head"].scale)
    loaded, _ = lowprec.load_artefact(tmp_path / "a")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, back.dequantize())
    converted = lowprec.apply_artefact(tiny.decoder(name), tmp_path / "a", runtime=True)
    assert isinstance(converted.get_submodule(TIED[name]), QuantEmbedding)
    ids = tiny.batch()
    with torch.no_grad():
        truth = loaded(ids).logits
        apart = converted(ids).logits.float() - truth
    assert float(apart.norm() / truth.norm()) < 0.05


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    model = tiny.decoder()
    solved = {"lm_head": tiny.rounded(model.lm_head.weight.detach(), "int4-g64-rows6")}
    write_own_form(
        tmp_path / "a", module=model, name="m", revision="r", solved=solved,
        schemes={"lm_head": scheme_named("w4a16-g64-rows6")}, tables={"lm_head": (TIED["llama"],)},
    )  # fmt: skip
    file = tmp_path / "a" / "lowprec.safetensors"
    content = bytearray(file.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    start = 8 + length + json.loads(content[8 : 8 + length])["lm_head.rows"]["data_offsets"][0]
    content[start] ^= 0xFF
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"lm_head has \d+ INT8 rows"):
        read_back(tmp_path / "a")


# All of a run


def test_a_run_for_bytes_quantises_an_embedding_that_is_not_tied(tmp_path: Path) -> None:
    report = lowprec.optimize(
        str(tiny.folder(tmp_path / "m", "llama-untied")), out=tmp_path / "out", budget="90%", objective="bytes",
        effort=dataclasses.replace(tiny.EFFORT, compensated=True, weighted=True, healing_passes=1),
        data=[str(tiny.text(tmp_path / "t.jsonl"))],
    )  # fmt: skip
    scored = json.loads((tmp_path / "out" / "sensitivity.json").read_text())["record"]
    offered = {row["scheme"] for row in scored if row["group"] == EMBEDDING}
    assert {"w8a16", "w6a16", "w4a16-g64"} <= offered, "six bits are offered where the file's bytes count"
    table = next(g for g in report.groups if g.group == EMBEDDING)
    assert table.scheme != "bf16"
    assert report.parity.holds
    assert EMBEDDING not in {u.name for u in report.unquantised}
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    assert torch.equal(
        loaded.get_input_embeddings().weight, read_back(tmp_path / "out" / "model")[EMBEDDING].dequantize()
    )
    assert report.cost.after == pytest.approx(report.cost.weight_bytes_after, rel=0.02)


def test_six_bits_are_stored_in_six_and_run_as_eight(tmp_path: Path) -> None:
    report = lowprec.optimize(
        str(tiny.folder(tmp_path / "m", "llama")), out=tmp_path / "out", budget="90%", objective="bytes",
        effort=dataclasses.replace(tiny.EFFORT, compensated=True, two_sided=True, healing_passes=0.5),
        data=[str(tiny.text(tmp_path / "t.jsonl"))], schemes=["int6"],
    )  # fmt: skip
    assert {group.scheme for group in report.groups} == {"w6a16"}
    assert report.parity.holds
    assert report.cost.after == pytest.approx(report.cost.weight_bytes_after, rel=0.02)
    header = read_header(tmp_path / "out" / "model" / "lowprec.safetensors").tensors
    assert header["lm_head.codes"][1] == (tiny.WORDS, 64 * 6 // 32)
    codes = read_back(tmp_path / "out" / "model")["lm_head"].codes
    assert -32 <= int(codes.min()) < int(codes.max()) <= 31
    converted = lowprec.apply_artefact(tiny.decoder(), tmp_path / "out" / "model", runtime=True)
    assert converted.lm_head.codes.dtype == torch.int8


@pytest.mark.parametrize("name", TIED)
def test_a_run_for_bytes_quantises_the_table_and_proves_it(name: str, tmp_path: Path) -> None:
    report = lowprec.optimize(
        str(tiny.folder(tmp_path / "m", name)), out=tmp_path / "out", budget="90%", objective="bytes",
        effort=dataclasses.replace(tiny.EFFORT, compensated=True, healing_passes=1),
        data=[str(tiny.text(tmp_path / "t.jsonl"))], schemes=["int8", "int4"],
    )  # fmt: skip
    head = next(g for g in report.groups if g.group == "lm_head")
    assert head.scheme != "bf16"
    assert report.artefact_form == "lowprec"
    assert report.parity.holds
    assert TIED[name] not in {u.name for u in report.unquantised}
    assert any("rows" in pair.scheme for pair in report.sensitivity.pairs)
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    before = sum(p.numel() * p.element_size() for p in tiny.decoder(name).parameters())
    assert report.cost.weight_bytes_before == before
    assert report.cost.after == pytest.approx(report.cost.weight_bytes_after, rel=0.02)
