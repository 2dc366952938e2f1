"""onnxruntime's own form: its operators compute what the codes say, its graphs answer as torch does at any size."""

import collections
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from lowprec.errors import UnsupportedError
from lowprec.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, QuantizedWeight
from lowprec.onnx.binding import Run
from lowprec.onnx.checks import check_file
from lowprec.onnx.graph import OPSET, Graph, graph_of, tidy
from lowprec.onnx.nbits import EXACT, FAST, AccuracyLevel, blocks_of, matmul_nbits, merged, refuses_nbits
from lowprec.onnx.partial import rotary_table, window_of
from lowprec.onnx.phases import MANY
from lowprec.onnx.products import PHASES, TOKEN, Level
from lowprec.onnx.runtime_form import RuntimeForm, exact_twin, to_runtime
from lowprec.onnx.session import left_padded, open_session, run_session

SLOW = pytest.mark.slow
TOLERANCE = 1e-4
HEAD, TABLE = "lm_head", "model.embed_tokens"
NBITS = sorted(name for name in WEIGHT_FORMATS if refuses_nbits(name) is None)


def product(weight: QuantizedWeight, level: AccuracyLevel, folder: Path, bias: Tensor | None = None) -> Path:
    """A file that multiplies x [R, K] with a weight."""
    n, k = weight.codes.shape
    x = ir.Value(name="x", shape=ir.Shape((None, k)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET, "com.microsoft": 1}, name="product")
    added = None
    if bias is not None:
        added = ir.Value(name="bias", const_value=ir.tensor(bias.numpy(), name="bias"))
        graph.register_initializer(added)
    graph.extend(matmul_nbits(graph, x, "layer", weight, level, added))
    y = graph[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape((None, n))
    graph.outputs.append(y)
    ir.save(ir.Model(graph, ir_version=10), folder / "product.onnx")
    return folder / "product.onnx"


def rounded_by_block(x: Tensor, size: int) -> Tensor:
    """[R, K] rounded to INT8, each block of `size` columns by its own absolute maximum."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp_min(1e-30)).round() * scale).view(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("fmt", NBITS)
@pytest.mark.parametrize("k", [128, 576])
def test_matmul_nbits_multiplies_with_the_very_codes(fmt: str, k: int, tmp_path: Path) -> None:
    if WEIGHT_FORMATS[fmt].fits(k):
        pytest.skip(f"{fmt} does not fit {k}")
    torch.manual_seed(0)
    weight, bias = tiny.rounded(torch.randn(24, k), fmt), torch.randn(24)
    session = open_session(product(weight, EXACT, tmp_path), threads=1)
    # One-hot rows pick single weights.
    assert torch.equal(run_session(session, {"x": torch.eye(k)})[0].T, weight.dequantize())
    x = torch.randn(5, k)
    added = open_session(product(weight, EXACT, tmp_path, bias), threads=1)
    torch.testing.assert_close(run_session(added, {"x": x})[0], x @ weight.dequantize().T + bias, rtol=0, atol=1e-4)
    fast = run_session(open_session(product(weight, FAST, tmp_path), threads=1), {"x": x})[0]
    expected = rounded_by_block(x, blocks_of(fmt).size) @ weight.dequantize().T
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-4)
    assert not np.allclose(fast, x @ weight.dequantize().T, atol=1e-2), "a scheme of its own"


def test_weights_that_share_an_input_become_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = [tiny.rounded(torch.randn(n, 128), "int4-g64-asym") for n in (16, 8, 8)]
    session = open_session(product(merged(parts), EXACT, tmp_path), threads=1)
    whole = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(run_session(session, {"x": torch.eye(128)})[0].T, whole)
    with pytest.raises(ValueError, match="no rows in common"):
        merged([parts[0], tiny.rounded(torch.randn(16, 128), "int8")])


def test_weights_that_matmul_nbits_does_not_take_are_named() -> None:
    assert "floating point" in str(refuses_nbits("fp8"))
    assert "two products" in str(refuses_nbits("int4-g64-rows25"))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="none")
    with pytest.raises(UnsupportedError, match="fp8 are no operand of MatMulNBits"):
        matmul_nbits(graph, ir.Value(name="x"), "layer", tiny.rounded(torch.randn(8, 32), "fp8"), EXACT)


# Graphs in float32


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def formed(model: Any, positions: int | None = None) -> RuntimeForm:
    """A model's graph in onnxruntime's operators, nothing in codes."""
    return to_runtime(graph_of(model), {}, {}, positions or model.config.max_position_embeddings)


def saved(graph: Graph, folder: Path) -> Path:
    """The graph as a checked file."""
    path = folder / "model.onnx"
    ir.save(graph.model, path, external_data="model.onnx.data")
    check_file(path, path)
    return path


def kinds(path: Path) -> list[str]:
    """Types of the nodes of a file."""
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def alone(model: Any, row: Tensor) -> Tensor:
    """Logits [T, V] of one sequence by torch: no padding, no mask, no cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return found


@pytest.fixture(
    scope="module", params=["llama", "gpt2", *(pytest.param(name, marks=SLOW) for name in ("qwen3", "gemma3"))]
)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model in torch, and the file of its graph."""
    model = tiny.decoder(request.param).float()
    made = formed(model)
    assert made.plain_attention is None
    return model, saved(made.graph, tmp_path_factory.mktemp("runtime"))


def assert_equal_logits(model: Any, path: Path, lengths: Sequence[int], cuts: Sequence[int], room: int = 0) -> None:
    """Rows of these lengths, padded on the left and given in chunks, against torch; `room` for a cache in one place."""
    rows = [tiny.batch(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask = left_padded(rows)
    width = ids.shape[1]
    run, parts = Run(open_session(path, threads=1), len(rows), room and width + room), []
    ends = [*sorted({cut for cut in cuts if 0 < cut < width}), width]
    for start, end in zip([0, *ends], ends, strict=False):
        parts.append(torch.from_numpy(run.step(ids[:, start:end].numpy(), mask[:, :end].numpy())))
    whole = torch.cat(parts, 1)
    assert bool(whole.isfinite().all()), "also where only padding is"
    for row, logits in zip(rows, whole, strict=True):
        torch.testing.assert_close(logits[-len(row) :], alone(model, row), rtol=0, atol=TOLERANCE)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 109), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 108), max_size=4),
    room=st.sampled_from([0, 1, 9]),
)
@example(lengths=[1], cuts=[], room=0)
@example(lengths=[101], cuts=[100], room=1)
@example(lengths=[101, 3, 100, 50, 1], cuts=[100], room=0)
@example(lengths=[101, 3, 100, 50, 1], cuts=[60, 100], room=1)
@example(lengths=[40, 33], cuts=[1, 2, 20, 39], room=5)
def test_any_batch_past_padding_and_chunks(
    decoder: tuple[Any, Path], lengths: list[int], cuts: list[int], room: int
) -> None:
    assert_equal_logits(*decoder, lengths, cuts, room)


def test_padding_anywhere(decoder: tuple[Any, Path]) -> None:
    model, path = decoder
    ids, mask = tiny.batch(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:], mask[2, :2], mask[2, 4:7], mask[2, 11:] = 0, 0, 0, 0
    logits = torch.from_numpy(Run(open_session(path, threads=1), 3).step(ids.numpy(), mask.numpy()))
    for row, real, found in zip(ids, mask.bool(), logits, strict=True):
        torch.testing.assert_close(found[real], alone(model, row[real]), rtol=0, atol=TOLERANCE)


def test_logits_of_the_last_tokens_alone(decoder: tuple[Any, Path]) -> None:
    _, path = decoder
    ids, mask = left_padded([tiny.batch(1, length, seed=length)[0] for length in (9, 4)])
    session = open_session(path, threads=1)
    whole = Run(session, 2).step(ids.numpy(), mask.numpy())
    for keep in (1, 3, 20):
        found = Run(session, 2).step(ids.numpy(), mask.numpy(), keep)
        assert found.shape[1] == min(keep, 9)
        np.testing.assert_allclose(found, whole[:, -keep:], rtol=0, atol=1e-5)


def test_a_layer_is_few_nodes(decoder: tuple[Any, Path]) -> None:
    model, path = decoder
    layers = model.config.num_hidden_layers
    found = kinds(path)
    assert found.count("GroupQueryAttention") == layers
    assert not {"Softmax", "Cos", "Sin", "ReduceMean", "Sigmoid", "Expand"} & set(found)
    if model.config.model_type == "llama":
        # Two norms, seven products, attention, SiLU and what it multiplies; 33 for rows, embedding and head.
        assert len(found) <= 12 * layers + 33, found


# What stays plain


def test_attention_that_does_not_match_stays_plain_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        **tiny.COMMON, intermediate_size=128, num_key_value_heads=2, partial_rotary_factor=0.5,
        bos_token_id=0, eos_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.StableLmForCausalLM(config).eval()
    made = formed(model)
    assert made.plain_attention is not None
    assert made.plain_attention.startswith("layer 0: ")
    path = saved(made.graph, tmp_path)
    assert "GroupQueryAttention" not in kinds(path)
    assert_equal_logits(model, path, [20, 7], [5], room=3)
    silent = to_runtime(made.graph, {}, {}, None)
    assert silent.plain_attention == "its configuration does not say for how many tokens it has positions"


def test_a_head_whose_inputs_are_rounded_by_token_gets_its_rows_back(tmp_path: Path) -> None:
    model = tiny.decoder("qwen3").float()
    weight = tiny.rounded(model.lm_head.weight.detach(), "int8")
    model.lm_head.weight = torch.nn.Parameter(weight.dequantize())
    made = to_runtime(graph_of(model), {HEAD: weight}, {HEAD: TOKEN}, model.config.max_position_embeddings)
    assert made.plain_attention is None
    path = saved(made.graph, tmp_path)
    assert kinds(path).count("MatMulIntegerToFloat") == 1
    by_token = ACTIVATION_FORMATS["int8-token"]
    model.lm_head.register_forward_pre_hook(lambda _, args: (by_token.fake_quantize(args[0]),))
    rows = [tiny.batch(1, length, seed=length)[0] for length in (9, 4)]
    ids, mask = left_padded(rows)
    found = torch.from_numpy(Run(open_session(path, threads=1), 2).step(ids.numpy(), mask.numpy()))
    for row, logits in zip(rows, found, strict=True):
        # A value at a tie may be rounded otherwise: one code of one input.
        torch.testing.assert_close(logits[-len(row) :], alone(model, row), rtol=0, atol=2e-3)


def test_weights_of_two_levels_are_read_in_four_bits_and_multiplied_in_eight(tmp_path: Path) -> None:
    model = tiny.decoder("llama").float()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    solved = {name: tiny.rounded(m.weight.detach(), "int4-two-level-g64") for name, m in layers.items()}
    # Both forms read the codes of this one.
    by_token = "model.layers.0.mlp.down_proj"
    solved[by_token] = tiny.rounded(layers[by_token].weight.detach(), "int8")
    levels: dict[str, Level] = dict.fromkeys(solved, PHASES) | {by_token: TOKEN}
    for name, m in layers.items():
        m.weight = torch.nn.Parameter(solved[name].dequantize())
    made = to_runtime(graph_of(model), solved, levels, model.config.max_position_embeddings)
    assert made.plain_attention is None
    path = saved(made.graph, tmp_path)
    branches = {
        a.name: a.g for n in onnx.load(path, load_external_data=False).graph.node for a in n.attribute if a.g.node
    }
    found = {name: collections.Counter(n.op_type for n in g.node) for name, g in branches.items()}
    assert found["then_branch"]["MatMulNBits"] == 4 * 3
    assert found["then_branch"]["MatMulIntegerToFloat"] == 1
    assert found["else_branch"]["MatMulIntegerToFloat"] == 4 * 3 + 1
    with exact_twin(path) as twin:
        assert_equal_logits(model, twin, [MANY + 3, 5], [7])
    for length, rounding, other in ((MANY - 1, "int8-block64", "int8-token"), (MANY, "int8-token", "int8-block64")):
        ids = tiny.batch(1, length)
        logits = torch.from_numpy(Run(open_session(path, threads=1), 1).step(ids.numpy(), torch.ones_like(ids).numpy()))

        def off(fmt: str, ids: Tensor = ids, logits: Tensor = logits) -> Tensor:
            """[T] how far each token's logits are from torch's with inputs rounded so, relative."""
            own = {m: "int8-token" if name == by_token else fmt for name, m in layers.items()}
            handles = [
                m.register_forward_pre_hook(lambda _, a, f=ACTIVATION_FORMATS[x]: (f.fake_quantize(a[0]),))
                for m, x in own.items()
            ]
            expected = alone(model, ids[0])
            for handle in handles:
                handle.remove()
            return (logits[0] - expected).norm(dim=-1) / expected.norm(dim=-1)

        # A value at a tie may be rounded otherwise, and all later tokens see it: the first ones are free of that.
        assert float(off(rounding).min()) < 1e-5
        assert float(off(other).min()) > 1e-3


def test_an_encoder_has_no_rows_to_move(tmp_path: Path) -> None:
    model = tiny.encoder()
    made = formed(model)
    assert made.plain_attention is None
    session = open_session(saved(made.graph, tmp_path), threads=1)
    ids, mask = tiny.batch(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    hidden = run_session(session, {"input_ids": ids, "attention_mask": mask})[0]
    for row, real, found in zip(ids, mask.bool(), hidden, strict=True):
        with torch.no_grad():
            expected = model(input_ids=row[real][None]).last_hidden_state[0]
        torch.testing.assert_close(found[real], expected, rtol=0, atol=TOLERANCE)


def test_angles_that_depend_on_the_length_are_no_table() -> None:
    made = graph_of(tiny.decoder().float())
    tidy(made)
    nodes = {node.op_type: node for node in made.model.graph if node.op_type in ("Cos", "Sin")}
    cos, sin = nodes["Cos"].outputs[0], nodes["Sin"].outputs[0]
    table = rotary_table(made.model, cos, sin, 64)
    assert not isinstance(table, str)
    assert table[0].shape == (64, 8)
    length = ir.node("ReduceMax", [nodes["Cos"].inputs[0]], {"keepdims": 0})
    longer = ir.node("Mul", [nodes["Cos"].inputs[0], length.outputs[0]])
    made.model.graph.insert_before(nodes["Cos"], [length, longer])
    nodes["Cos"].replace_input_with(0, longer.outputs[0])
    assert rotary_table(made.model, cos, sin, 64) == "its rotary angles depend on the length of the text"


def test_angles_that_change_from_some_length_on_are_no_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    long = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, "factor": 8.0}
    config = copy.deepcopy(tiny.DECODERS["llama"])
    config.max_position_embeddings, half = 256, config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = long | {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    made = formed(model)
    assert "depend on the length" in str(made.plain_attention)
    path = saved(made.graph, tmp_path)
    # One at a time: in a batch the longest decides over all, in torch as well.
    for length, cut in ((40, 36), (20, 9)):
        assert_equal_logits(model, path, [length], [cut])


def test_masks_are_asked_what_they_hide() -> None:
    made = graph_of(tiny.decoder("gemma3").float())
    tidy(made)
    masks = [node.outputs[0] for node in made.model.graph if node.op_type == "Where"]
    found = [window_of(made.model, mask, 64) for mask in masks]
    assert sorted(x for x in found if isinstance(x, int)) == [0, 16]
    wrong = next(node for node in made.model.graph if node.op_type == "LessOrEqual")
    swapped = ir.node("LessOrEqual", wrong.inputs[::-1])
    made.model.graph.insert_before(wrong, swapped)
    ir.convenience.replace_all_uses_with(wrong.outputs[0], swapped.outputs[0])
    assert all("hides something else" in str(window_of(made.model, mask, 64)) for mask in masks)
