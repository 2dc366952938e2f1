"""What hides a token from attention, in float32, in float16 and in integers: however large scores are."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from lowprec.errors import UnsupportedError
from lowprec.onnx.fixed import Sizes, fix_sizes
from lowprec.onnx.graph import Graph, graph_of
from lowprec.onnx.half import to_half
from lowprec.onnx.hidden import HALF, MARGIN, find_hiding, hide_in_grid, hide_with
from lowprec.onnx.static_qdq import quantize_graph
from lowprec.onnx.windows import Text, calls, deviation, lengths_seen, plain_session

LEAST = float(np.finfo(np.float32).min)
TOKENS, WIDTH = 6, 8
OTHER = -1e32
"""As small as what hides, and no mask."""


class Attention(nn.Module):
    """One head, with scores as large as `scale` makes them; a mask [B, T] hides keys."""

    def __init__(self, scale: float, fill: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale, self.fill = scale, fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D], [B, T] -> [B, T, D]."""
        scores = self.q(x) @ self.k(x).transpose(1, 2) * self.scale
        seen = mask[:, None, :] > 0
        scores = scores.masked_fill(~seen, LEAST) if self.fill else scores + torch.where(seen, 0.0, LEAST)
        return torch.maximum(scores.softmax(-1) @ self.v(x), torch.tensor(OTHER))


def example() -> dict[str, Tensor]:
    x = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([TOKENS, 4, 2, 1])
    return {"x": x, "mask": (torch.arange(TOKENS) < lengths[:, None]).long()}


def fixed(module: nn.Module) -> tuple[Graph, Text]:
    graph = graph_of(module, example())
    fix_sizes(graph, Sizes())
    return graph, Text(kind="module", windows=None, inputs=example(), sizes=Sizes())


def scalars(model: Any) -> list[float]:
    found = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return sorted(float(t.numpy().min()) for t in found if t.size == 1)


@pytest.mark.parametrize("fill", [False, True])
def test_float32_keeps_what_hides_and_large_scores_do_not_leak(fill: bool, tmp_path: Path) -> None:
    module = Attention(60.0, fill)
    graph, text = fixed(module)
    assert scalars(graph.model)[0] == LEAST
    ir.save(graph.model, tmp_path / "model.onnx")
    assert deviation(tmp_path / "model.onnx", module, text).largest < 1e-5


@pytest.mark.parametrize("fill", [False, True])
def test_float16_hides_with_what_can_be_added_to_a_score(fill: bool, tmp_path: Path) -> None:
    module = Attention(60.0, fill)
    graph, _ = fixed(module)
    assert len(find_hiding(graph).uses) == 1
    hide_with(graph, HALF)
    assert scalars(graph.model)[:2] == [np.float32(OTHER), HALF], "what is no mask stays"
    assert float(np.float16(HALF)) == HALF
    assert np.isfinite(np.float16(HALF) + np.float16(HALF))
    ir.save(to_half(graph.model, frozenset()), tmp_path / "model.onnx")
    session = plain_session(tmp_path / "model.onnx")
    expected = module(**example()).detach()
    for row, (length, x) in enumerate(zip(example()["mask"].sum(1), example()["x"], strict=True)):
        feed = {"x": x[None].numpy().astype(np.float16), "mask": example()["mask"][row : row + 1].numpy()}
        found = torch.from_numpy(session.run(None, feed)[0]).float()
        # One key: whatever its score is, its value is all that is seen.
        assert length > 1 or float((found[0] - expected[row]).abs().max()) < 5e-3


@pytest.mark.parametrize("fill", [False, True])
def test_integers_hide_below_every_score_by_a_margin(fill: bool, tmp_path: Path) -> None:
    module = Attention(60.0, fill)
    graph, text = fixed(module)
    scores = list(find_hiding(graph).scores)
    hide_in_grid(graph, text, tmp_path / "model.onnx", 16)
    hidden = scalars(graph.model)[1]
    ir.save(graph.model, tmp_path / "float.onnx")
    outputs = [o[-len(scores) :] for _, o in calls(plain_session(tmp_path / "float.onnx", scores), text)]
    masks = example()["mask"].bool()
    assert -1000 < hidden < -64, "what -64 hid before leaked"
    for arrays, mask in zip(outputs, masks, strict=True):
        summed = arrays[-1][0]
        if not mask.all():
            assert summed[:, ~mask].max() < summed[:, mask].min() - MARGIN + 1e-3
    assert deviation(tmp_path / "float.onnx", module, text).largest < 1e-5


@pytest.mark.parametrize("fill", [False, True])
def test_a_graph_in_integers_hides_what_large_scores_would_let_through(fill: bool, tmp_path: Path) -> None:
    module = Attention(60.0, fill)
    graph, text = fixed(module)
    quantize_graph(graph, {}, text, tmp_path / "model.onnx", activation_bits=16, weight_bits=8)
    assert deviation(tmp_path / "model.onnx", module, text).largest < 0.05


def test_scores_that_a_grid_cannot_hold_are_refused(tmp_path: Path) -> None:
    graph, text = fixed(Attention(600.0))
    with pytest.raises(UnsupportedError, match="8 bits cannot hold this model's attention scores") as refused:
        hide_in_grid(graph, text, tmp_path / "model.onnx", 8)
    assert "take a form of 16-bit activations" in refused.value.reasons[0]
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_hides_nothing_is_left_alone(tmp_path: Path) -> None:
    class Floor(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(x @ x.transpose(1, 2), torch.tensor(OTHER)).softmax(-1)

    given = {"x": example()["x"]}
    graph = graph_of(Floor(), given)
    fix_sizes(graph, Sizes())
    text = Text(kind="module", windows=None, inputs=given, sizes=Sizes())
    hide_in_grid(graph, text, tmp_path / "model.onnx", 8)
    assert scalars(graph.model)[0] == np.float32(OTHER)


def test_encoders_of_a_fixed_size_are_run_with_padding_too() -> None:
    assert lengths_seen(32, Sizes(sequence=16)) == (16, 8)
    assert lengths_seen(32, None) == (32,)
    assert lengths_seen(32, Sizes(sequence=1)) == (1,)
