"""Rotated hidden states and heads: the same function in another basis, or a refusal that says why."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import lowprec
import tiny
from lowprec.artifacts.loading import quiet
from lowprec.artifacts.safetensors_io import load_tensors
from lowprec.errors import UnsupportedError
from lowprec.pipeline import summarise
from lowprec.steps.load import Model, decoder_forward, load, sentence_forward, wrap
from lowprec.steps.measure import run_through
from lowprec.steps.rotate import EXACT, REFUSED, exact_norms_, hidden_basis, turned, turning_of
from lowprec.steps.stream import Forward, Stream
from lowprec.steps.tokens import Batch
from lowprec.transforms import Merge
from lowprec.transforms.rotation import HiddenBasis, Turning, orthogonal, rotate, rotate_heads

TURNED = ("llama", "llama-untied", "mistral", "qwen3")
REASONS = {"gemma3": "outputs change", "gpt2": "read no norm", "bert": "read no norm"}
# Where a head's width is nowhere in the shapes: as many values as outputs, with biases; and q, k and v in one layer.
OTHERS = {
    "biased": LlamaConfig(**tiny.COMMON, intermediate_size=128, num_key_value_heads=4, attention_bias=True),
    "joint": Phi3Config(**tiny.COMMON, intermediate_size=128, num_key_value_heads=4, pad_token_id=0),
}


def batch(seed: int = 0) -> Batch:
    return Batch(ids=tiny.batch(2, 16, seed), lengths=torch.tensor([16, 16]), index=(0, 1))


def found(model: nn.Module, forward: Forward = decoder_forward) -> HiddenBasis:
    return hidden_basis(Stream(model, forward, batch()), batch())


def exact_copy(model: nn.Module, basis: HiddenBasis) -> Any:
    """A copy that computes in float64 throughout."""
    made = copy.deepcopy(model).double()
    exact_norms_(made, basis)
    return made


def decoder(name: str) -> Any:
    """One whose vectors, gains and biases, are of all sizes."""
    if name in OTHERS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[name]).eval().to(torch.bfloat16)
    else:
        model = tiny.decoder(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(0.5, 2.0, len(parameter)))
    return model


def wrapped(name: str = "llama") -> Model:
    return wrap(decoder(name), decoder_forward, tokenizer=tiny.tokenizer(), kind="decoder")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 3))
def test_a_rotation_of_any_width_is_orthogonal_and_spreads(width: int, seed: int) -> None:
    rotation = orthogonal(width, seed)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    power = width & -width
    assert float(rotation.abs().max()) <= power**-0.5 + 1e-12, "no channel keeps more than a Hadamard matrix leaves it"
    assert torch.equal(rotation, orthogonal(width, seed))


@pytest.mark.parametrize("width", [64, 576, 1024])
def test_channels_of_one_sign_do_not_gather_in_one_channel(width: int) -> None:
    """A Hadamard matrix by itself has a row of ones: a mean over channels would all go there."""
    turned = torch.ones(width, dtype=torch.float64) @ orthogonal(width, 1)
    assert float(turned.abs().max()) < 6.0, "at random the largest of so many is about 3"


@pytest.mark.parametrize("width", [64, 576])
def test_another_seed_spreads_otherwise(width: int) -> None:
    x = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (x @ orthogonal(width, seed) for seed in (0, 1))
    assert not torch.allclose(one.abs().sort().values, other.abs().sort().values)


@pytest.mark.parametrize("name", TURNED)
def test_logits_stay_in_float64(name: str) -> None:
    model = decoder(name)
    basis = found(model)
    assert len(basis.norms) == 7
    assert len(basis.writers) == 6
    exact = exact_copy(model, basis)
    ids = tiny.batch(2, 20, 5)
    with torch.no_grad():
        before = exact(ids).logits
        table = exact.get_input_embeddings().weight.clone()
        rotate(exact, basis, orthogonal(basis.width, 3))
        after = exact(ids).logits
    assert float((after - before).abs().max() / before.abs().max()) <= EXACT
    assert not torch.allclose(exact.get_input_embeddings().weight, table), "something was turned"
    assert exact.get_input_embeddings().weight is not exact.get_output_embeddings().weight


@pytest.mark.parametrize("name", [*tiny.DECODERS, *OTHERS])
def test_every_decoder_is_turned_exactly_heads_included_or_refused_with_a_reason(name: str) -> None:
    model = decoder(name)
    stream = Stream(model, decoder_forward, batch())
    if name in REASONS:
        with pytest.raises(UnsupportedError, match=REFUSED) as caught:
            turning_of(stream, batch())
        assert REASONS[name] in caught.value.reasons[0]
        return
    turning = turning_of(stream, batch())
    assert [place.head for place in turning.heads] == [16, 16, 16], "one in each block, of the width of a head"
    exact = exact_copy(model, turning.basis)
    ids = tiny.batch(2, 20, 5)
    with torch.no_grad():
        before = exact(ids).logits
        without = copy.deepcopy(exact)
        Turning(basis=turning.basis).apply(without, 3)
        turning.apply(exact, 3)
        after = exact(ids).logits
    assert float((after - before).abs().max() / before.abs().max()) <= EXACT
    for place in turning.heads:
        for layer in (place.source, *place.consumers):
            one, other = (module.get_submodule(layer).weight for module in (exact, without))
            assert not torch.allclose(one, other), f"{layer} was turned inside, too"


def test_a_joint_layer_turns_its_values_alone() -> None:
    model = decoder("joint")
    place = turning_of(Stream(model, decoder_forward, batch()), batch()).heads[0]
    before = model.get_submodule(place.source).weight.clone()
    rotate_heads(model, place, orthogonal(place.head))
    after = model.get_submodule(place.source).weight
    assert torch.equal(after[:128], before[:128]), "queries and keys stay"
    assert not torch.equal(after[128:], before[128:])


def test_a_rotation_is_found_where_it_cancels_alone() -> None:
    """Two heads' channels must not mix, and no rotation passes a product of channels."""
    model = decoder("llama")
    heads = turning_of(Stream(model, decoder_forward, batch()), batch()).heads
    assert {place.source.rpartition(".")[2] for place in heads} == {"v_proj"}
    basis = found(model)
    for head, source, consumer in ((32, "self_attn.v_proj", "self_attn.o_proj"), (16, "mlp.up_proj", "mlp.down_proj")):
        block = "model.layers.1."
        place = Merge(source=block + source, consumers=(block + consumer,), channels=32, head=head)
        exact = exact_copy(model, basis)
        with torch.no_grad():
            before = exact(tiny.batch()).logits
            rotate_heads(exact, place, orthogonal(head))
            after = exact(tiny.batch()).logits
        assert float((after - before).abs().max() / before.abs().max()) > 1e3 * EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_may_be_turned_is_looked_for_without_a_change(dtype: torch.dtype) -> None:
    """In float64 materialising copies nothing."""
    model = tiny.decoder().to(dtype)
    before = copy.deepcopy(model.state_dict())
    turning_of(Stream(model, decoder_forward, batch()), batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings


def test_weights_that_are_no_parameters_are_refused() -> None:
    model = tiny.decoder()
    layer = model.get_submodule("model.layers.1.self_attn.o_proj")
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)
    with pytest.raises(UnsupportedError, match=REFUSED) as caught:
        found(model)
    assert "model.layers.1.self_attn.o_proj is no parameter" in caught.value.reasons[0]
    assert layer._parameters.get("weight") is None


@pytest.mark.parametrize("name", REASONS)
def test_models_whose_hidden_states_have_a_basis_of_their_own_are_refused(name: str) -> None:
    model = tiny.encoder() if name == "bert" else tiny.decoder(name)
    with pytest.raises(UnsupportedError, match=REFUSED) as caught:
        found(model, sentence_forward if name == "bert" else decoder_forward)
    assert REASONS[name] in caught.value.reasons[0]


def test_a_turned_model_is_a_copy_that_knows_what_it_was() -> None:
    model = wrapped()
    before = copy.deepcopy(model.module.state_dict())
    made = turned(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert model.config.tie_word_embeddings
    assert not made.config.tie_word_embeddings
    assert {p.dtype for p in made.module.parameters()} == {torch.float32}
    assert made.dtype == torch.bfloat16
    assert made.original is not None
    assert made.original.bytes == model.bytes
    assert made.bytes == model.bytes + 2 * tiny.WORDS * 64, "the head's own table, in bfloat16"
    assert len({model.revision, made.revision, turned(model, seed=1).revision}) == 3
    assert turned(model).revision == made.revision
    with torch.no_grad():
        expected = copy.deepcopy(model.module).float()(tiny.batch()).logits
        logits = made.module(tiny.batch()).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_stream_as_stored_computes_with_rounded_weights() -> None:
    module = turned(wrapped()).module
    stream = Stream(module, decoder_forward, batch())
    stored = run_through(stream.stored_in(torch.bfloat16), [batch()]).hidden[0]
    rounded = copy.deepcopy(module).to(torch.bfloat16).float()
    assert torch.equal(stored, run_through(Stream(rounded, decoder_forward, batch()), [batch()]).hidden[0])
    assert not torch.equal(stored, run_through(stream, [batch()]).hidden[0]), "the reference is not rounded"


def test_a_module_whose_artefact_is_layers_alone_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(tiny.WORDS, 8), nn.Linear(8, tiny.WORDS))
    model = wrap(module, lambda m, b: m(b.ids), tokenizer=tiny.tokenizer(), kind="decoder")
    with pytest.raises(UnsupportedError, match=r"rounded layers alone\n.*leave --rotate out"):
        turned(model)


def test_a_run_that_cannot_turn_its_model_says_so_before_anything_is_spent(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m", "gpt2")
    with pytest.raises(UnsupportedError, match=rf"{REFUSED}\n.*read no norm.*\n.*leave --rotate out"):
        optimised(tmp_path)
    assert not list((tmp_path / "out").glob("*.json"))


# In a run


def optimised(place: Path, out: str = "out", rotate: bool = True, **changed: Any) -> lowprec.Report:
    settings: dict[str, Any] = {
        "budget": "90%", "objective": "bytes", "effort": tiny.EFFORT, "data": [tiny.text(place / "t.jsonl")],
        "schemes": ["w8a8-int8"], "embeddings": False,
    }  # fmt: skip
    return lowprec.optimize(place / "m", out=place / out, rotate=rotate, **settings | changed)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tied model."""
    decoder("llama").save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "smoothed, compensated and healed"])
def test_a_run_judges_the_turned_artefact_against_the_original(place: Path, how: str) -> None:
    effort = tiny.EFFORT if how == "plain" else dataclasses.replace(tiny.EFFORT, compensated=True, healing_passes=1)
    report = optimised(place, effort=effort, smooth=how != "plain")
    assert report.turned
    assert {g.scheme for g in report.groups} == {"w8a8-int8"}
    assert report.parity.codes_equal
    assert report.parity.kl_nats == 0.0, "what was scored had unrounded weights in bfloat16 already"
    assert report.parity.holds
    unturned = optimised(place, "unturned", rotate=False)
    assert not unturned.turned
    # A reference in bfloat16 would be off by more than a thousand times that.
    assert report.loss.perplexity_before == pytest.approx(unturned.loss.perplexity_before, rel=1e-6)
    assert report.plan.revision != unturned.plan.revision

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(place / "out" / "model", dtype=torch.float32)
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    with torch.no_grad():
        logits, expected = model(tiny.batch()).logits, load(place / "m").module.float()(tiny.batch()).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.2
    assert "another orthonormal basis" in (place / "out" / "model" / "README.md").read_text()
    assert "hidden states in another basis" in (place / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [False, True])
def test_bytes_are_those_of_the_tied_original_and_of_what_is_stored(place: Path, embeddings: bool) -> None:
    report = optimised(place, embeddings=embeddings, schemes=["int8"])
    folder = place / "out" / "model"
    tensors, _ = load_tensors(folder / ("lowprec.safetensors" if embeddings else "model.safetensors"))
    assert {t.dtype for name, t in tensors.items() if name.endswith("norm.weight")} == {torch.bfloat16}
    cost, original = report.cost, load(place / "m").bytes
    assert cost.before == cost.weight_bytes_before == original
    assert cost.weight_bytes_after == sum(t.nbytes for t in tensors.values())
    # Every packed layer also stores its shape, two int64.
    assert cost.after == pytest.approx(cost.weight_bytes_after, abs=16 * 22)
    assert cost.reduction_measured == 1.0 - cost.weight_bytes_after / original
    kept = {u.name: u.bytes for u in report.unquantised}
    assert kept.get("model.embed_tokens") == (None if embeddings else 2 * tiny.WORDS * 64)
    assert kept["norms and biases"] == 2 * 7 * 64
    lightest = min(report.frontier, key=lambda point: point.bytes)
    assert lightest.bytes == pytest.approx(lightest.cost, abs=1)
    loaded, _ = lowprec.load_artefact(folder)
    assert loaded.config.tie_word_embeddings is False


@pytest.mark.slow
def test_kernels_run_what_is_stored_and_the_module_is_put_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[set[torch.dtype]] = []

    def measure(module: nn.Module, *_: object) -> tuple[float, float]:
        timed.append({t.dtype for t in module.parameters() if t.is_floating_point()})
        return 1.0, 1.0

    monkeypatch.setattr(summarise, "measure_end_to_end", measure)
    held: list[Model] = []
    monkeypatch.setattr("lowprec.api.turned", lambda *given: held.append(turned(*given)) or held[0])
    optimised(place)
    assert timed == [{torch.bfloat16}] * 2
    assert {p.dtype for p in held[0].module.parameters()} == {torch.float32}
    fresh = turned(load(place / "m")).module.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in held[0].module.state_dict().items())
