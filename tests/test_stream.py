"""The cut and the groups, for every architecture that the loader takes."""

import pytest
import torch
from torch import Tensor, nn

import tiny
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import weight_of
from lowprec.steps.load import decoder_forward
from lowprec.steps.stream import Override, Stream


def streamed(stream: Stream, batch: Tensor, overlay: dict[str, Override] | None = None) -> Tensor:
    overlay = overlay or {}
    with torch.no_grad():
        with stream.outer(overlay):
            hidden, calls = stream.enter(batch)
        for index in range(stream.depth):
            with stream.block(index, overlay):
                hidden = stream.run(index, hidden, calls[index])
        with stream.outer(overlay):
            return stream.leave(hidden, batch)


def encode(module: nn.Module, ids: Tensor) -> Tensor:
    hidden: Tensor = module(input_ids=ids).last_hidden_state
    return hidden[:, 0]


@pytest.mark.parametrize("name", list(tiny.DECODERS))
def test_streaming_equals_the_whole_model(name: str) -> None:
    model, ids = tiny.decoder(name), tiny.batch()
    stream = Stream(model, decoder_forward, ids[:1, :8])
    assert stream.depth == len(stream.block_names) > 1
    found = streamed(stream, ids)
    torch.testing.assert_close(found, decoder_forward(tiny.decoder(name).float(), ids), rtol=0, atol=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()), "the stored weights must come back"


def test_encoders_stream_too() -> None:
    model, ids = tiny.encoder(), tiny.batch()
    stream = Stream(model, encode, ids[:1, :8])
    assert stream.depth == 3
    torch.testing.assert_close(streamed(stream, ids), encode(model, ids), rtol=0, atol=1e-5)


def test_a_module_without_a_cut_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    stream = Stream(model, lambda m, b: m(b), x[:1])
    assert stream.whole
    torch.testing.assert_close(streamed(stream, x), model(x))
    groups, _ = find_groups(stream)
    assert [g.layers for g in groups] == [("0",), ("2",)]


def test_blocks_out_of_order_are_not_taken_for_a_cut() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.blocks[0](x)
            return first + self.blocks[2](self.blocks[1](first + 1.0))

    model, x = Skips(), torch.randn(2, 8)
    stream = Stream(model, lambda m, b: m(b), x)
    assert stream.whole
    torch.testing.assert_close(streamed(stream, x), model(x))


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "qwen3", "gemma3"])
def test_groups_are_what_runtimes_fuse(name: str) -> None:
    stream = Stream(tiny.decoder(name), decoder_forward, tiny.batch(1, 8))
    groups, unquantised = find_groups(stream)
    roles = [g.role for g in groups if g.block == 0]
    assert roles == ["qkv", "o", "gate_up", "down"]
    assert groups[-1].name == "lm_head"
    assert groups[-1].block is None
    assert sum(len(g.layers) for g in groups) == len(stream.layers), "every linear layer is in one group"
    reasons = {u.name: u.reason for u in unquantised}
    tied = "embedding; stays as it is whatever becomes of lm_head, which is tied to it"
    assert reasons["model.embed_tokens"] == (tied if stream.module.config.tie_word_embeddings else "embedding")


def test_layers_are_groups_of_their_own_where_nothing_fuses_them() -> None:
    stream = Stream(tiny.decoder("llama"), decoder_forward, tiny.batch(1, 8))
    groups, _ = find_groups(stream, fused=False)
    assert [g.role for g in groups if g.block == 0] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert groups[0].name == "model.layers.0.self_attn.q"
    assert {layer for g in groups for layer in g.layers} == set(stream.layers)


class Routed(nn.Module):
    """A block whose experts are given the tokens that a router sends them; `heads` are not experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 64] -> the same."""
        tokens, chosen = x.flatten(0, 1), self.router(x).flatten(0, 1).argmax(-1)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            if (rows := (chosen == number).nonzero().flatten()).numel():
                mixed[rows] = expert(tokens[rows])
        return x + mixed.view_as(x) + sum(head(x) for head in self.heads)


@pytest.mark.parametrize("cut", [True, False])
def test_layers_that_a_router_chooses_between_stay_and_say_why(cut: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.ModuleList(Routed() for _ in range(2))

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        for block in module.blocks:
            x = block(x if cut else x + 1.0)
        return x

    stream = Stream(model, forward, torch.randn(1, 8, 64))
    assert stream.whole != cut
    groups, unquantised = find_groups(stream)
    taken = {layer for group in groups for layer in group.layers}
    assert taken == {f"blocks.{i}.{name}" for i in range(2) for name in ("router", "heads.0", "heads.1")}
    routed = {u.name for u in unquantised if u.reason.startswith("a router decides")}
    assert routed == {f"blocks.{i}.experts.{e}.{n}" for i in range(2) for e in range(4) for n in (0, 2)}


def test_a_model_of_vectors_has_no_router() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        for block in module.blocks:
            x = block(x)
        return x

    groups, _ = find_groups(Stream(model, forward, torch.randn(2, 8)))
    assert len(groups) == 3


def test_gpt2_conv1d_has_its_width_the_right_way_round() -> None:
    stream = Stream(tiny.decoder("gpt2"), decoder_forward, tiny.batch(1, 8))
    groups, _ = find_groups(stream)
    fused = next(g for g in groups if g.role == "attn.c_attn")
    assert (fused.n, fused.k) == (192, 64)


def test_every_byte_is_accounted_for() -> None:
    model = tiny.decoder("llama-untied")
    groups, unquantised = find_groups(Stream(model, decoder_forward, tiny.batch(1, 8)))
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(2 * g.parameters for g in groups) + sum(u.bytes for u in unquantised) == total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_override_replaces_one_layer_and_leaves_the_tied_embedding_alone(name: str) -> None:
    model, ids = tiny.decoder(name), tiny.batch()
    stream = Stream(model, decoder_forward, ids[:1, :8])
    layer = stream.layers["lm_head"]
    halved = weight_of(layer).float() / 2
    changed = streamed(stream, ids, {"lm_head": Override(weight=lambda: halved)})
    torch.testing.assert_close(changed, streamed(stream, ids) / 2, rtol=1e-4, atol=1e-4)


def test_an_override_reaches_a_layer_inside_a_block() -> None:
    model, ids = tiny.decoder("gpt2"), tiny.batch()
    stream = Stream(model, decoder_forward, ids[:1, :8])
    name = "transformer.h.1.mlp.c_fc"
    weight = weight_of(stream.layers[name]).float() * 1.5
    changed = streamed(stream, ids, {name: Override(weight=lambda: weight)})
    direct = tiny.decoder("gpt2").float()
    direct.get_submodule(name).weight.data.mul_(1.5)
    torch.testing.assert_close(changed, decoder_forward(direct, ids), rtol=1e-4, atol=1e-3)


def test_an_activation_override_rounds_the_input() -> None:
    model, ids = tiny.decoder(), tiny.batch()
    stream = Stream(model, decoder_forward, ids[:1, :8])
    name = "model.layers.0.mlp.down_proj"
    changed = streamed(stream, ids, {name: Override(weight=None, activation="int8-token")})
    plain = streamed(stream, ids)
    assert 0 < float((changed - plain).abs().max()) < float(plain.abs().max())
    torch.testing.assert_close(streamed(stream, ids), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_weights_of_its_own_is_cut_by_those_of_an_overlay(name: str) -> None:
    model, ids = tiny.decoder(name).float(), tiny.batch()
    stream = Stream(model, decoder_forward, ids[:1, :8])
    expected, names = streamed(stream, ids), list(stream.layers)
    kept = {layer: weight_of(stream.layers[layer]).clone() for layer in names}
    overlay = {layer: Override(weight=lambda w=weight: w) for layer, weight in kept.items()}
    for layer in names:
        module = stream.layers[layer]
        module.weight = nn.Parameter(torch.full((), torch.nan).expand(module.weight.shape), requires_grad=False)
    hollow = Stream(model, decoder_forward, ids[:1, :8], overlay=overlay)
    assert hollow.block_names == stream.block_names
    assert all(hollow.calls[layer] for layer in names)
    assert all(hollow.layers[layer].weight.untyped_storage().nbytes() == 4 for layer in names)
    torch.testing.assert_close(streamed(hollow, ids, overlay), expected, rtol=0, atol=0)


def test_weights_come_back_when_a_block_raises() -> None:
    model = tiny.decoder()
    stream = Stream(model, decoder_forward, tiny.batch(1, 8))
    with pytest.raises(ZeroDivisionError), stream.block(0):
        1 / 0  # noqa: B018
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
