"""The KV cache in codes in onnxruntime: the same codes as our own cache, in both forms, and what is done without."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import tiny
from lowprec.artifacts.loading import load_artefact
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.artifacts.stored_cache import write_cache
from lowprec.errors import ConfigError
from lowprec.formats import CACHE_FORMATS, SCHEMES
from lowprec.onnx import export_onnx
from lowprec.onnx.binding import Run
from lowprec.onnx.coded_cache import FORMAT, refuses, refuses_heads
from lowprec.onnx.module import OnnxModule
from lowprec.onnx.phases import MANY
from lowprec.onnx.session import Session, left_padded, open_session
from lowprec.records import CachePlace, RoundedPart
from lowprec.runtime.convert import weight_of, weighted_modules
from lowprec.runtime.kvcache import cache_argument
from lowprec.runtime.request_cache import request_cache
from lowprec.runtime.serving_cache import leave_cache_
from lowprec.settings import Settings
from lowprec.steps.caches import find_caches, ranges, scales_of
from lowprec.steps.load import decoder_forward
from lowprec.steps.stream import Stream
from lowprec.targets.onnxruntime import OnnxRuntimeTarget

TOKENS = 40


def parts_of(model: Any) -> tuple[RoundedPart, ...]:
    """All keys and values, with scales that a text was measured for."""
    stream = Stream(model, decoder_forward, tiny.batch(1, 8))
    found = find_caches(stream, tiny.batch(), FORMAT)
    scales = {(module, part): s for module, part, s in scales_of(ranges(stream, found.groups, [tiny.batch()]), FORMAT)}
    return tuple(
        RoundedPart(
            module=p.module, layer=p.layer, part=p.part, format=FORMAT,
            # Coarser than it would be, so that the rounding is seen.
            scales=tuple(8.0 * s for s in scales[p.module, p.part]),
        )
        for p in found.groups[0].places
    )  # fmt: skip


def artefact(path: Path, name: str, scheme: str = "w4a16-g32", parts: Sequence[RoundedPart] | None = None) -> Path:
    """An artefact whose weights are rounded, and whose cache is to be."""
    model = tiny.decoder(name)
    layers = {x: m for x, m in weighted_modules(model).items() if x.endswith("proj")}
    solved = {x: tiny.rounded(weight_of(m), str(SCHEMES[scheme].weight)) for x, m in layers.items()}
    write_own_form(
        path, module=model, name="org/m", revision=weights_digest(model), solved=solved,
        schemes=dict.fromkeys(solved, SCHEMES[scheme]), tokenizer=tiny.tokenizer(),
        generation_config=model.generation_config,
    )  # fmt: skip
    write_cache(path, parts_of(model) if parts is None else parts)
    return path


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def place(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact and its export."""
    torch.set_num_threads(1)
    path: Path = tmp_path_factory.mktemp(request.param)
    artefact(path / "model", request.param)
    export_onnx(path / "model", path / "onnx", target="onnxruntime")
    return path


def stored(run: Run) -> list[Tensor]:
    """Keys and values that a run holds, layer by layer."""
    return [torch.from_numpy(value.numpy()) for value in run._cache]


def in_steps(run: Run, ids: Any, mask: Any, step: int) -> Tensor:
    """Logits of all tokens, read `step` at a time."""
    starts = range(0, ids.shape[1], step)
    made = [run.step(ids[:, start : start + step], mask[:, : start + step]) for start in starts]
    return torch.from_numpy(np.concatenate(made, 1))


def texts(rows: int = 1, tokens: int = TOKENS) -> Tensor:
    return tiny.batch(rows, tokens, seed=3)


@pytest.mark.slow
def test_both_forms_store_the_codes_of_our_own_cache(place: Path) -> None:
    session, ids = open_session(place / "onnx" / "model.onnx", 1), texts().numpy()
    model, _ = load_artefact(place / "model")
    ours: Any = request_cache(model)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids), use_cache=True, **{cache_argument(model): ours})
    for step in (TOKENS, MANY - 1, MANY, 1):
        run = Run(session, 1, TOKENS + 7)
        in_steps(run, ids, np.ones_like(ids), step)
        found = stored(run)
        assert {x.dtype for x in found} == {torch.int8}
        # What the first layer stores hangs on nothing that was rounded; later layers see codes, or what they stand for.
        for part, codes in zip(("keys", "values"), found[:2], strict=True):
            expected = ours.layers[0]._tokens[part].read()[0]
            off = (codes[:, :, :TOKENS].int() - expected.int()).abs()
            assert int(off.max()) <= 1, "no code but one whose value lies halfway"
            assert float((off > 0).double().mean()) < 0.01
            assert not codes[:, :, TOKENS:].any(), "the room stays as it was"


@pytest.mark.slow
def test_decoding_gives_what_our_own_cache_gives(place: Path) -> None:
    session, ids = open_session(place / "onnx" / "model.onnx", 1), texts()
    model, _ = load_artefact(place / "model")
    plain, _ = load_artefact(place / "model")
    leave_cache_(plain)
    logits = in_steps(Run(session, 1, TOKENS), ids.numpy(), np.ones((1, TOKENS), np.int64), 5)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        unrounded = plain(input_ids=ids, use_cache=False).logits
    rounding = float((expected - unrounded).norm())
    assert rounding > 1e-2 * float(expected.norm()), "the cache's rounding is seen, so the next line is a check"
    assert float((logits - expected).norm()) < 0.05 * rounding


@pytest.mark.slow
def test_a_text_is_scored_as_decoding_sees_it(place: Path) -> None:
    ids = texts(3)
    module = OnnxModule(place / "onnx", threads=1, room=4)
    model, _ = load_artefact(place / "model")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    scored = module(input_ids=ids)
    assert scored.past_key_values is None
    assert scored.logits.shape == expected.shape
    with module.at_once():
        at_once = module(input_ids=ids).logits
    assert torch.equal(at_once, module(input_ids=ids, use_cache=True).logits)
    error = [float((x - expected).norm()) for x in (scored.logits, at_once)]
    assert error[0] < 0.2 * error[1], "a prompt that is read at once sees its own keys as they are"
    assert torch.equal(module(input_ids=ids, logits_to_keep=2).logits, scored.logits[:, -2:])
    ones = torch.ones_like(ids)
    assert torch.equal(module(input_ids=ids, attention_mask=ones).logits, scored.logits)
    assert torch.equal(Session(place / "onnx", threads=1).logits(ids), scored.logits)
    module.positions = TOKENS - 1
    with pytest.raises(ConfigError, match=f"{TOKENS} tokens"):
        module(input_ids=ids)


@pytest.mark.slow
def test_padding_batches_and_parts_change_nothing(place: Path) -> None:
    session = open_session(place / "onnx" / "model.onnx", 1)
    rows = [row[:n] for row, n in zip(texts(3), (TOKENS, 17, 3), strict=True)]
    ids, mask = (x.numpy() for x in left_padded(rows))
    # By the same number of rows, so by the same form.
    logits = in_steps(Run(session, 3, TOKENS), ids, mask, 4)
    for i, row in enumerate(rows):
        expected = in_steps(Run(session, 1, len(row)), row[None].numpy(), np.ones((1, len(row)), np.int64), 4)[0]
        off = (logits[i, TOKENS - len(row) :] - expected).norm() / expected.norm()
        assert float(off) < 1e-2, "but for a code whose value lies halfway"


@pytest.mark.slow
def test_text_is_generated_from_prompts_of_any_length(place: Path) -> None:
    session = Session(place / "onnx", threads=1)
    prompts = [row[:n].tolist() for row, n in zip(texts(2), (30, 4), strict=True)]
    # In parts so small that all are read by the form for few rows, whose tokens see codes alone.
    together = session.generate(prompts, 8, stop=(), chunk=4)
    assert [len(row) for row in together] == [8, 8]
    assert session.generate(prompts[1:], 8, stop=(), chunk=4) == together[1:]
    assert [len(row) for row in session.generate(prompts, 8, stop=())] == [8, 8], "nor do long parts stop it"
    assert session.logits(texts()).shape == (1, TOKENS, session.vocabulary), "without room for more, too"


@pytest.mark.slow
def test_the_graph_says_what_it_is(place: Path) -> None:
    model = onnx.load(place / "onnx" / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(place / "onnx" / "model.onnx"), full_check=True)
    cache = [v for v in (*model.graph.input, *model.graph.output) if "key" in v.name or "value" in v.name]
    assert {v.type.tensor_type.elem_type for v in cache} == {onnx.TensorProto.INT8}
    notes = {p.key: p.value for p in model.metadata_props}["lowprec.notes"]
    assert "before they are rounded" in notes
    assert "is not rounded to 8 bits" not in notes


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_what_cannot_keep_codes_says_so(target: str, tmp_path: Path) -> None:
    parts = parts_of(tiny.decoder())[:2]
    written = export_onnx(artefact(tmp_path / "model", "llama", parts=parts), tmp_path / "onnx", target=target)
    assert any("is not rounded to 8 bits" in note for note in written.notes)
    assert any("in codes, or none" in note for note in written.notes) == (target == "onnxruntime")
    assert open_session(tmp_path / "onnx" / "model.onnx").get_inputs()[2].type == "tensor(float)"


def test_which_parts_can_be_kept() -> None:
    parts = parts_of(tiny.decoder())
    assert refuses(parts, 3) is None
    assert "or none" in str(refuses(parts, 4))
    assert "or none" in str(refuses(parts[1:], 3))
    other = [RoundedPart(module=p.module, layer=p.layer, part=p.part, format="kv8-int8") for p in parts]
    assert "not kv8-int8" in str(refuses(other, 3))


def test_heads_and_attention_that_have_no_codes_are_told_before_anything_is_spent() -> None:
    places = [CachePlace(module="a", layer=0, part=p, heads=2, width=100) for p in ("keys", "values")]
    assert "these have 100" in str(refuses_heads(places))
    assert refuses_heads([replace(p, width=96) for p in places]) is None
    assert "of one size" in str(refuses_heads([places[0], replace(places[1], width=96)]))
    target = OnnxRuntimeTarget()
    good = [replace(p, width=16) for p in places]
    assert target.fits(tiny.decoder(), good) is None
    assert "100" in str(target.fits(tiny.decoder(), places))
    partial = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            rotary_pct=0.25,
        )
    )  # fmt: skip
    assert target.fits(partial.eval(), good), "half-turned heads are not the operator's"


def test_attention_is_timed_in_both_forms() -> None:
    target = OnnxRuntimeTarget(seconds_per_sample=0.0)
    assert target.offered_cache in CACHE_FORMATS
    assert target.keeps(target.offered_cache) is None
    assert "int8-channel" in str(target.keeps("kv8-int8"))
    place = CachePlace(module="a", layer=0, part="keys", heads=2, width=16, queries=4)
    for added, held in ((20, 0), (1, 30)):
        plain, codes = target.time_cache(place, (None, target.offered_cache), 2, added, held)
        assert (plain.scheme, codes.scheme) == ("bf16", target.offered_cache)
        assert codes.bytes * 4 == plain.bytes == 2 * (added + held) * 2 * 16 * 4, "float32 is what it has without codes"
        assert (codes.m, codes.n, codes.k) == (2 * added, held + added, 32)
        assert 0 < codes.p20_us <= codes.p80_us


def test_a_cache_that_there_is_not_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown KV cache 'int8-chanel'.*int8-channel"):
        Settings(out=tmp_path, kv_cache="int8-chanel")
    assert Settings(out=tmp_path).cache_format(FORMAT) == FORMAT
    assert Settings(out=tmp_path, ladder=True).cache_format(FORMAT) is None
    assert Settings(out=tmp_path, kv_cache="none").cache_format(FORMAT) is None
    assert Settings(out=tmp_path, kv_cache="8").cache_format(FORMAT) == "kv8-int8"
