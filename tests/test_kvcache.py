"""The KV cache in 8 bits: its formats, our cache against a reference, what a served model computes, and bad input."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM
from transformers.cache_utils import DynamicLayer

import tiny
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.loading import load_artefact
from lowprec.artifacts.stored_cache import FILE_NAME, cache_notes, cache_scheme, read_cache, write_cache
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.formats import CACHE_FORMATS, scheme_named, schemes_named
from lowprec.records import RoundedPart
from lowprec.runtime.kvcache import PARTS, STEP, RoundedLayer, by_layer, cache_argument, fake_quantize
from lowprec.runtime.measure_cache import measure_cache
from lowprec.runtime.request_cache import RequestCache, every_part, request_cache
from lowprec.runtime.serving_cache import serve_cache, serving_cache
from lowprec.settings import Settings
from lowprec.steps.caches import Caches, find_caches, find_places, ranges, scales_of
from lowprec.steps.load import decoder_forward
from lowprec.steps.stream import Stream

FORMATS = list(CACHE_FORMATS)
DECODERS = ("llama", "qwen3", "gpt2", "gemma3")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CHANNELS = 3 * 16
# No power of two, at which values of so small a model lie halfway between codes.
SCALE = 0.061279296875


def part(
    fmt: str, which: Any = "keys", layer: int = 0, module: str = "", channels: int = CHANNELS, scale: float = 0.0625
) -> RoundedPart:
    """A part with calibrated scales, where its format has them, all alike."""
    found = RoundedPart(module=module, layer=layer, part=which, format=fmt)
    if CACHE_FORMATS[fmt].largest is None:
        return found
    by_channel = CACHE_FORMATS[fmt].by_channel
    return dataclasses.replace(found, **({"scales": (scale,) * channels} if by_channel else {"scale": scale}))


# Formats


@pytest.mark.parametrize("name", FORMATS)
@given(power=st.integers(-20, 5), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_a_value_is_off_by_half_a_step_at_most(name: str, power: int, seed: int, dtype: torch.dtype) -> None:
    fmt, x = CACHE_FORMATS[name], (normal(2, 3, 5, 16, seed=seed) * 2.0**power).to(dtype)
    step = 2.0 ** (power - (5 if fmt.by_channel else 6))
    rounded = fake_quantize(x, part(name, scale=step))
    assert rounded.dtype == dtype
    largest = x.float().abs().amax(-1, keepdim=True)
    # The scale in bfloat16 is off by 2^-9: of the largest code, that is a quarter of a step beyond the half.
    # FP8 has three bits of mantissa, so half a step is 2^-4 of the value; below its normal range it is constant.
    limit = 0.75 * largest / 127 if fmt.largest is None else x.float().abs() * 2.0**-4 + 2.0 ** (power - 6 - 10)
    if fmt.by_channel:
        # Beyond the last code values are clipped: 4 times the deviation of `x` at the step chosen here.
        limit = (x.float().abs() - 127 * step).clamp_min(step / 2)
    if dtype == torch.bfloat16:
        limit = limit + x.float().abs() * 2.0**-8
    assert bool(((rounded.float() - x.float()).abs() <= limit * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_is_rounded_by_itself(name: str) -> None:
    x = normal(2, 3, 8, 16)
    loud = x.clone()
    loud[:, :, 3] *= 1e3
    one, other = fake_quantize(x, part(name)), fake_quantize(loud, part(name))
    assert torch.equal(one[:, :, :3], other[:, :, :3])
    assert torch.equal(one[:, :, 4:], other[:, :, 4:])
    # And where each head has a scale of its own, so is a head.
    if CACHE_FORMATS[name].largest is None:
        loud = x.clone()
        loud[:, 1] *= 1e3
        assert torch.equal(fake_quantize(loud, part(name))[:, [0, 2]], one[:, [0, 2]])


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_codes_and_scales(name: str) -> None:
    fmt, x = CACHE_FORMATS[name], normal(1, 3, 7, 16)
    codes, scales = fmt.encode(x, part(name).calibrated)
    stored = codes.nbytes + (0 if scales is None else scales.nbytes)
    assert stored == 7 * fmt.bytes_per_token(3, 16)
    assert 8 * codes.element_size() == fmt.bits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_rounds_once_whatever_it_multiplies_in(name: str, dtype: torch.dtype) -> None:
    fmt, scale = CACHE_FORMATS[name], part(name, scale=0.01055908203125).calibrated
    codes, scales = fmt.encode(normal(2, 3, 50, 16), scale)
    given: Any = scale if scales is None else scales
    assert torch.equal(fmt.decode(codes, given, dtype), fmt.decode(codes, given, torch.float32).to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_and_damage_shows(name: str) -> None:
    assert not fake_quantize(torch.zeros(1, 1, 2, 8), part(name, channels=8)).any()
    if CACHE_FORMATS[name].by_channel:
        return  # Its codes are whole numbers, and its scales are known: there is nothing to say NaN with.
    broken = torch.ones(1, 1, 2, 8)
    broken[0, 0, 1, 3] = float("nan")
    found = fake_quantize(broken, part(name))
    assert torch.isfinite(found[0, 0, 0]).all()
    assert torch.isnan(found[0, 0, 1]).any()


def test_a_static_format_needs_its_scale() -> None:
    with pytest.raises(ConfigError, match="calibrated scale"):
        CACHE_FORMATS["kv8-fp8"].encode(torch.ones(1, 1, 1, 4))
    with pytest.raises(ConfigError, match="a calibrated scale for each of 1 x 4 channels"):
        CACHE_FORMATS["kv8-channel-int8"].encode(torch.ones(1, 1, 1, 4), (1.0, 1.0))
    with pytest.raises(ConfigError, match="calibrated scales"):
        every_part(tiny.DECODERS["llama"], "kv8-fp8")


def test_a_cache_format_is_no_scheme_for_weights() -> None:
    assert scheme_named("kv8-int8").weight is None
    with pytest.raises(ConfigError, match="unknown scheme 'kv8-int8'"):
        schemes_named(["int8", "kv8-int8"])


# Our cache against transformers' own, which is given what was rounded before


class Reference:
    """`DynamicLayer` over rounded keys and values."""

    def __init__(self, rounded: dict[Any, RoundedPart]) -> None:
        self.layer, self.rounded = DynamicLayer(), rounded

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        given = [
            x if (found := self.rounded.get(p)) is None else fake_quantize(x, found)
            for p, x in zip(PARTS, (keys, values), strict=True)
        ]
        found: tuple[Tensor, Tensor] = self.layer.update(*given)
        return found


@given(
    which=st.sampled_from([("keys",), ("values",), PARTS]),
    fmt=st.sampled_from(FORMATS),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, STEP + 3)),
            st.tuples(st.just("crop"), st.integers(0, 5)),
            st.tuples(st.just("reorder"), st.integers(0, 99)),
            st.tuples(st.just("repeat"), st.integers(1, 2)),
            st.tuples(st.just("select"), st.integers(0, 99)),
            st.tuples(st.just("reset"), st.just(0)),
        ),
        min_size=1,
        max_size=9,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_the_layer_is_the_reference_bit_for_bit(
    which: tuple[Any, ...], fmt: str, steps: list[tuple[str, int]], dtype: torch.dtype
) -> None:
    rounded = {p: part(fmt, p, channels=2 * 8) for p in which}
    ours, reference = RoundedLayer(rounded), Reference(rounded)
    batch, length = 2, 0
    for number, (kind, size) in enumerate([("update", 3), *steps]):
        if kind == "update":
            keys, values = (normal(batch, 2, size, 8, seed=2 * number + i).to(dtype) for i in (0, 1))
            expected, found = reference.update(keys, values), ours.update(keys, values)
            assert all(torch.equal(e, f) and e.dtype == f.dtype for e, f in zip(expected, found, strict=True))
            length += size
        elif kind == "crop":
            size = min(size, length - 1) if length else 0
            ours.crop(-size)
            reference.layer.crop(-size)
            length -= size
        elif kind == "reset":
            ours.reset()
            reference.layer.reset()
            batch, length = 2, 0
        elif length and batch <= 8:
            beams = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(size))
            name, argument = {
                "reorder": ("reorder_cache", beams),
                "repeat": ("batch_repeat_interleave", size),
                "select": ("batch_select_indices", beams),
            }[kind]
            getattr(ours, name)(argument)
            getattr(reference.layer, name)(argument)
            batch *= size if kind == "repeat" else 1
        assert ours.get_seq_length() == reference.layer.get_seq_length() == length
        assert ours.get_mask_sizes(2) == reference.layer.get_mask_sizes(2)


def test_crop_keeps_the_first_tokens_where_it_is_asked_as_before() -> None:
    layer = RoundedLayer({"keys": part("kv8-int8")})
    layer.update(normal(1, 2, 9, 8), normal(1, 2, 9, 8))
    layer.crop(4)
    assert layer.get_seq_length() == 4
    layer.crop(-9)
    assert layer.get_seq_length() == 0


# Models


def places_of(model: Any) -> dict[int, str]:
    return {place.layer: place.module for place in find_places(model, tiny.batch())[0]}


def parts_of(model: Any, fmt: str = "kv8-int8") -> tuple[RoundedPart, ...]:
    found, _ = find_places(model, tiny.batch())
    return tuple(part(fmt, p.part, p.layer, p.module, p.heads * p.width, SCALE) for p in found)


def logits(model: Any, ids: Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, **more)


@pytest.mark.parametrize(
    ("name", "module", "layers", "sizes"),
    [
        ("llama", "model.layers.{}.self_attn", [0, 1, 2], (2, 16)),
        ("qwen3", "model.layers.{}.self_attn", [0, 1, 2], (2, 16)),
        ("gpt2", "transformer.h.{}.attn", [0, 1, 2], (4, 16)),
        ("gemma3", "model.layers.{}.self_attn", [5], (2, 16)),
    ],
)
def test_caches_are_found_by_running_the_model(name: str, module: str, layers: list[int], sizes: Any) -> None:
    found, left = find_places(tiny.decoder(name), tiny.batch())
    assert [(p.layer, p.part) for p in found] == [(layer, p) for layer in layers for p in PARTS]
    assert {p.module for p in found} == {module.format(layer) for layer in layers}
    assert {(p.heads, p.width) for p in found} == {sizes}
    assert bool(left) == (name == "gemma3")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_sees_what_one_pass_sees(name: str, fmt: str) -> None:
    model, ids = tiny.decoder(name).float(), tiny.batch()
    parts = parts_of(model, fmt)
    plain = logits(model, ids, use_cache=False).logits
    with serving_cache(model, parts):
        expected = logits(model, ids, use_cache=False).logits
        for cuts in ([24], [1] * 24, [7, 5, 1, 1, 10]):
            cache: Any = request_cache(model)
            assert cache.parts == parts
            out, start = [], 0
            for size in cuts:
                step = logits(model, ids[:, start : start + size], use_cache=True, **{cache_argument(model): cache})
                out.append(step.logits)
                start += size
            torch.testing.assert_close(torch.cat(out, 1), expected, rtol=1e-4, atol=1e-4)
    rounding = (expected - plain).abs().max()
    assert rounding > 1e-3, "the cache is rounded in a pass without one, too"
    assert torch.equal(logits(model, ids, use_cache=False).logits, plain), "and nothing is left behind"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, ids = tiny.decoder(name).float(), tiny.batch(1, 9)
    serve_cache(model, parts_of(model))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    batch = torch.cat([padded, torch.cat([ids, ids[:, :4]], 1)])
    arguments: dict[str, Any] = {
        "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    alone = model.generate(ids, **arguments)
    both = model.generate(batch, attention_mask=torch.cat([mask, torch.ones_like(mask)]), **arguments)
    for one, two in zip(alone.logits, both.logits, strict=True):
        torch.testing.assert_close(one[0], two[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_served_model_generates_with_codes(beams: int) -> None:
    model, ids = tiny.decoder().float(), tiny.batch(2, 6)
    serve_cache(model, parts_of(model))
    arguments: dict[str, Any] = {
        "max_new_tokens": 16, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "return_dict_in_generate": True,
    }  # fmt: skip
    name = cache_argument(model)
    ours = model.generate(ids, **arguments)
    assert isinstance(getattr(ours, name), RequestCache)
    # A cache of transformers holds the same numbers in 16 bits, or 32 here.
    theirs = model.generate(ids, **arguments, **{name: DynamicCache(config=model.config)})
    assert type(getattr(theirs, name)) is DynamicCache
    assert torch.equal(ours.sequences, theirs.sequences)
    step = logits(model, ids, use_cache=True)
    assert isinstance(getattr(step, name), RequestCache), "so does a pass that makes its own cache"
    assert getattr(logits(model, ids, use_cache=False), name) is None


def test_bytes_of_a_whole_cache_are_measured() -> None:
    model = tiny.decoder().float().to(torch.bfloat16)
    ids = tiny.batch(3, 2 * STEP)
    caches = {}
    for bits in (8, 16):
        cache = request_cache(model, bits)
        logits(model, ids, use_cache=True, **{cache_argument(model): cache})
        caches[bits] = cache.bytes
    numbers = 3 * 2 * STEP * model.config.num_hidden_layers * 2
    assert caches[16] == numbers * 2 * 16 * 2
    assert caches[8] == numbers * CACHE_FORMATS["kv8-int8"].bytes_per_token(2, 16)
    logits(model, ids[:, :1], use_cache=True, **{cache_argument(model): cache})
    assert cache.bytes > caches[16]


# Admission


def test_a_request_keeps_the_precision_that_it_was_admitted_with() -> None:
    model, ids = tiny.decoder().float(), tiny.batch(1, 10)
    name, parts = cache_argument(model), parts_of(tiny.decoder())
    exact = logits(model, ids, use_cache=False).logits
    serve_cache(model, parts)
    full = request_cache(model, 16)
    found = logits(model, ids, use_cache=True, **{name: full}).logits
    assert torch.equal(found, exact), "16 bits round nothing, whatever the model was judged with"
    assert full.parts == ()
    rounded = request_cache(model)
    assert rounded.parts == parts == request_cache(model, 8).parts
    logits(model, ids[:, :6], use_cache=True, **{name: rounded})
    with pytest.raises(ConfigError, match="cannot be raised"):
        rounded.lower(())
    with pytest.raises(ConfigError, match="cannot be raised"):
        rounded.lower(parts[1:])
    with pytest.raises(AttributeError):
        rounded.parts = ()  # type: ignore[misc]
    assert rounded.parts == parts
    after = logits(model, ids[:, 6:], use_cache=True, **{name: rounded}).logits
    torch.testing.assert_close(after, logits(model, ids, use_cache=False).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_request_may_be_lowered_with_what_it_holds() -> None:
    model, ids = tiny.decoder().float(), tiny.batch(1, 10)
    name, parts = cache_argument(model), parts_of(tiny.decoder())
    cache = request_cache(model, 16)
    logits(model, ids[:, :6], use_cache=True, **{name: cache})
    held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    before = cache.bytes
    cache.lower(parts[:1])
    cache.lower(parts)
    assert cache.get_seq_length() == 6
    assert cache.parts == parts
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        found = layer.update(keys[:, :, :0], values[:, :, :0])
        for p, x, y in zip(PARTS, (keys, values), found, strict=True):
            assert torch.equal(fake_quantize(x, by_layer(parts)[0][p]), y)
    assert cache.bytes < before * STEP / 6
    logits(model, ids[:, 6:], use_cache=True, **{name: cache})


def test_bits_that_there_are_not() -> None:
    model = tiny.decoder()
    with pytest.raises(ConfigError, match="4 bits: give 8, 16"):
        request_cache(model, 4)
    with pytest.raises(ConfigError, match="no transformers configuration"):
        request_cache(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="unknown KV cache '4'"):
        Settings(out=Path("."), kv_cache="4")


def test_a_served_model_is_served_once_and_can_be_copied() -> None:
    model, ids = tiny.decoder().float(), tiny.batch(1, 6)
    parts = parts_of(model)
    serve_cache(model, parts)
    expected = logits(model, ids, use_cache=False).logits
    serve_cache(model, parts)
    with pytest.raises(ConfigError, match="another KV cache"):
        serve_cache(model, parts[:2])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids, use_cache=False).logits, expected)
        out = twin.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        assert isinstance(getattr(out, cache_argument(model)), RequestCache)


# Bad input


def state_space() -> Any:
    layers = ["conv", "full_attention", "conv"]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=300, num_hidden_layers=3, layer_types=layers, **sizes)).eval()


def crossing() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, add_cross_attention=True))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: tiny.decoder("mistral"), "layers 0, 1, 2 is a sliding window of 4096 tokens"),
        (crossing, "cross-attention"),
        (tiny.encoder, "BertModel is no decoder"),
        (lambda: nn.Linear(2, 2), "Linear is no decoder"),
    ],
)
def test_models_without_such_a_cache_are_refused_with_reason_and_remedy(made: Any, words: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        find_places(made(), tiny.batch())
    assert words in str(error.value)
    assert "give --kv-cache none" in str(error.value)


def test_layers_with_windows_or_states_stay_as_they_are() -> None:
    model = state_space()
    found, left = find_places(model, tiny.batch())
    assert {p.layer for p in found} == {1}
    assert "layers 0, 2 is a state" in left[0]
    cache = request_cache(model, 8)
    assert [isinstance(layer, RoundedLayer) for layer in cache.layers] == [False, True, False]
    with pytest.raises(UnsupportedError, match="layers 0 is a state"):
        RequestCache(model.config, [part("kv8-int8", layer=0)])
    with pytest.raises(UnsupportedError, match="has 3 layers"):
        RequestCache(model.config, [part("kv8-int8", layer=3)])
    stream = Stream(tiny.decoder("gemma3"), decoder_forward, tiny.batch(1, 8))
    with pytest.raises(UnsupportedError, match="one format for all layers"):
        find_caches(stream, tiny.batch(), "kv8-fp8")


def test_keys_that_are_not_finite_are_named() -> None:
    model = tiny.decoder()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    stream = Stream(model, decoder_forward, tiny.batch(1, 8))
    caches = find_caches(stream, tiny.batch(), "kv8-fp8")
    with pytest.raises(Exception, match=r"keys of model\.layers\.1\.self_attn hold NaN or infinite"):
        ranges(stream, caches.groups, [tiny.batch()])


# On disk


def test_kv_cache_json_is_read_back_and_damage_is_an_error(tmp_path: Path) -> None:
    parts = (
        part("kv8-int8", "keys", 0, "a"),
        part("kv8-fp8", "values", 1, "b"),
        part("kv8-channel-int8", "values", 2, "c", 2, scale=0.25),
    )
    assert read_cache(tmp_path) == ()
    write_cache(tmp_path, ())
    assert not (tmp_path / FILE_NAME).exists()
    write_cache(tmp_path, parts)
    assert read_cache(tmp_path) == parts
    text = (tmp_path / FILE_NAME).read_text()
    for damaged, words in (
        (text[:-9], "cannot be used"),
        (text.replace('"kv8-int8"', '"kv4-int4"'), "does not know"),
        (text.replace('"keys"', '"queries"'), "does not know"),
        (text.replace("0.0625", "-1.0"), "the scale -1.0"),
        (text.replace("0.0625", "null"), "the scale None"),
        (text.replace("0.25", "0.0", 1), r"the scale \(0.0, 0.25\)"),
    ):
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(ArtifactError, match=words):
            read_cache(tmp_path)


def test_a_checkpoint_says_of_the_cache_only_what_is_true() -> None:
    fp8 = [part("kv8-fp8", p) for p in PARTS]
    said = cache_scheme(fp8)
    assert said is not None
    assert (said.num_bits, said.type, said.strategy, said.symmetric, said.dynamic) == (
        8,
        "float",
        "tensor",
        True,
        False,
    )
    assert cache_scheme([]) is None
    # vLLM would take these for FP8.
    assert cache_scheme([part("kv8-int8")]) is None
    assert cache_scheme([*fp8, part("kv8-int8")]) is None
    assert "16 bits" in cache_notes([part("kv8-int8")])[0]
    assert all(name in CACHE_FORMATS and cache_notes([part(name)]) for name in FORMATS), "each format has its note"


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_artefact_whose_cache_alone_is_rounded_loads(fmt: str, tmp_path: Path) -> None:
    model, ids = tiny.decoder(), tiny.batch(1, 8)
    model.config.architectures = [type(model).__name__]
    parts = parts_of(model, fmt)
    written = write_artefact(
        tmp_path / "model", config=model.config, tensors=model.state_dict(), solved={}, schemes={}, cache=parts,
        finish=lambda folder: write_cache(folder, parts),
    )  # fmt: skip
    assert written.runtime_notes == cache_notes(parts)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert ("quantization_config" in stored) == (fmt == "kv8-fp8")
    loaded, _ = load_artefact(tmp_path / "model")
    whole = type(model)(model.config).eval().float()
    whole.load_state_dict(model.state_dict())
    plain = logits(whole, ids, use_cache=False).logits
    serve_cache(whole, parts)
    expected = logits(whole, ids, use_cache=False).logits
    assert torch.equal(logits(loaded, ids, use_cache=False).logits, expected)
    assert request_cache(loaded).parts == parts
    library, _ = load_artefact(tmp_path / "model", activations="library")
    # Should a later release round what the checkpoint says, the note about it has to go.
    assert torch.equal(logits(library, ids, use_cache=False).logits, plain)


# Groups


def test_groups_are_layer_by_layer_or_all_at_once() -> None:
    stream = Stream(tiny.decoder(), decoder_forward, tiny.batch(1, 8))
    fine = find_caches(stream, tiny.batch(), "kv8-int8")
    assert [(g.role, g.block) for g in fine.groups] == [(p, i) for i in range(3) for p in PARTS]
    whole = find_caches(stream, tiny.batch(), "kv8-fp8")
    assert [(g.name, len(g.places)) for g in whole.groups] == [("kv_cache", 6)]
    assert find_caches(stream, tiny.batch(), "kv8-channel-int8").groups == whole.groups
    assert {place.queries for place in whole.groups[0].places} == {tiny.DECODERS["llama"].num_attention_heads}
    chosen = fine.parts({"model.layers.1.self_attn.values": "kv8-int8", "model.layers.0.self_attn.keys": "bf16"})
    assert [(p.module, p.part) for p in chosen] == [("model.layers.1.self_attn", "values")]
    assert list(fine.overlay({fine.names[0]: "kv8-int8"})) == ["model.layers.0.self_attn"]
    assert Caches().parts({}) == ()


def test_scales_hold_what_calibration_saw_with_headroom() -> None:
    stream = Stream(tiny.decoder(), decoder_forward, tiny.batch(1, 8))
    caches = find_caches(stream, tiny.batch(), "kv8-fp8")
    found = ranges(stream, caches.groups, [tiny.batch(), tiny.batch(seed=1)])
    assert len(found) == 6
    for module, p, (scale,) in scales_of(found, "kv8-fp8"):
        assert 448 * scale == pytest.approx(2 * float(found[module, p].max()), rel=2**-8)
    by_channel = scales_of(found, "kv8-channel-int8")
    assert len(by_channel) == 6
    for module, p, scales in by_channel:
        expected = (1.25 * found[module, p].flatten()).tolist()
        assert [127 * scale for scale in scales] == pytest.approx(expected, rel=2**-8)
    assert scales_of(found, "kv8-int8") == ()


def test_the_clock_times_every_format() -> None:
    found = measure_cache(2, 16, [None, *FORMATS], 1, 1, 40, seconds_per_candidate=0.01)
    assert set(found) == {None, *FORMATS}
    assert all(0 < t.p20_us <= t.p50_us <= t.p80_us for t in found.values())
