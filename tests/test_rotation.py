"""Rotated hidden states: the same function in another basis, or a refusal that says why."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from lowprec.errors import UnsupportedError
from lowprec.steps.load import decoder_forward, sentence_forward
from lowprec.steps.rotate import EXACT, REFUSED, exact_copy, hidden_basis
from lowprec.steps.stream import Forward, Stream
from lowprec.steps.tokens import Batch
from lowprec.transforms.rotation import HiddenBasis, orthogonal, rotate

TURNED = ("llama", "llama-untied", "mistral", "qwen3")


def batch(seed: int = 0) -> Batch:
    return Batch(ids=tiny.batch(2, 16, seed), lengths=torch.tensor([16, 16]), index=(0, 1))


def found(model: nn.Module, forward: Forward = decoder_forward) -> HiddenBasis:
    return hidden_basis(Stream(model, forward, batch()), batch())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 3))
def test_a_rotation_of_any_width_is_orthogonal_and_spreads(width: int, seed: int) -> None:
    rotation = orthogonal(width, seed)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    power = width & -width
    assert float(rotation.abs().max()) <= power**-0.5 + 1e-12, "no channel keeps more than a Hadamard matrix leaves it"
    assert torch.equal(rotation, orthogonal(width, seed))


@pytest.mark.parametrize("name", TURNED)
def test_logits_stay_in_float64(name: str) -> None:
    model = tiny.decoder(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(0.5, 2.0, len(parameter)))
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


def test_the_basis_is_looked_for_without_a_change() -> None:
    model = tiny.decoder()
    before = copy.deepcopy(model.state_dict())
    found(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma3", "outputs change"), ("gpt2", "read no norm"), ("bert", "read no norm")]
)
def test_models_whose_hidden_states_have_a_basis_of_their_own_are_refused(name: str, reason: str) -> None:
    model = tiny.encoder() if name == "bert" else tiny.decoder(name)
    with pytest.raises(UnsupportedError, match=REFUSED) as caught:
        found(model, sentence_forward if name == "bert" else decoder_forward)
    assert reason in caught.value.reasons[0]
