"""A decoder of Llama's kind with random weights, in plain PyTorch, its linear layers in the kernels under test.

RMS norm, rotary positions, scaled-dot-product attention over a static cache of keys and values; one projection for
queries, keys and values, one for gate and up. A plan says which op each kind of linear layer runs in; activations are
quantised by the cast kernels, in "fused" plans together with the norm or the activation function before them. Every
layer has weights of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import candidates
from bench.gpu.candidates import BY_NAME, Case, Op, Tensors
from bench.gpu.setting import Decoder, Setting

BF16 = "bf16"
KINDS = ("qkv", "o", "gate_up", "down", "head")
ROPE_BASE = 500000.0
EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which op each linear layer runs in ("bf16": PyTorch's), and whether casts are fused with what is before them."""

    name: str
    attention: str
    mlp: str
    head: str
    fused: bool = False

    def op(self, kind: str) -> str:
        """The op's name for a kind of layer."""
        return {"qkv": self.attention, "o": self.attention, "head": self.head}.get(kind, self.mlp)


def _uniform(name: str, op: str, fused: bool = False) -> Plan:
    return Plan(name=name, attention=op, mlp=op, head=op, fused=fused)


PLANS = (
    _uniform("bf16", BF16),
    _uniform("w4a16-g128", "w4a16-g128"),
    _uniform("w8a8-fp8", "w8a8-fp8"),
    _uniform("w8a8-int8", "w8a8-int8"),
    Plan(name="attention w8a8-int8, mlp w4a16-g128, head bf16", attention="w8a8-int8", mlp="w4a16-g128", head=BF16),
    _uniform("w8a16", "w8a16"),
    _uniform("w4a8-fp8-g128", "w4a8-fp8-g128"),
    _uniform("w4a8-int8-g128", "w4a8-int8-g128"),
    _uniform("w8a8-fp8 fused", "w8a8-fp8", fused=True),
    _uniform("w8a8-int8 fused", "w8a8-int8", fused=True),
    _uniform("w4a8-fp8-g128 fused", "w4a8-fp8-g128", fused=True),
)


def sizes(d: Decoder) -> dict[str, tuple[int, int]]:
    """(n, k) of each kind of linear layer."""
    return {
        "qkv": ((d.heads + 2 * d.kv_heads) * d.head, d.hidden),
        "o": (d.hidden, d.heads * d.head),
        "gate_up": (2 * d.intermediate, d.hidden),
        "down": (d.hidden, d.intermediate),
        "head": (d.vocabulary, d.hidden),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Activations that are quantised already, and the dtype of what is computed from them."""

    tensors: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One layer: its weight and the op that it runs in, None for PyTorch's matmul."""

    op: Op | None
    weight: Tensors
    dtype: torch.dtype

    def __call__(self, x: Tensor | Codes) -> Tensor:
        """[M, K], quantised here unless it is already -> [M, N]."""
        if self.op is None:
            assert isinstance(x, Tensor)
            return F.linear(x, self.weight[0])
        if isinstance(x, Codes):
            inputs = x.tensors
        else:
            inputs = (x,) if self.op.cast == "none" else candidates.fast_cast(self.op.cast)(x)
        return candidates.launch(self.op, inputs, self.weight, None, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`rows` tokens at once: one for each of `batch` sequences, or the prompt of one."""

    name: str
    batch: int
    rows: int
    prefill: bool


def phases(d: Decoder) -> list[Phase]:
    """Steps at each batch, and a prefill."""
    steps = [Phase(name=f"decode, batch {b}", batch=b, rows=b, prefill=False) for b in d.step_batches]
    return [*steps, Phase(name=f"prefill, {d.prompt} tokens", batch=1, rows=d.prompt, prefill=True)]


class Model:
    """A decoder's weights in a plan."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        self.plan, self.setting, self.d = plan, setting, setting.decoder
        shapes = sizes(self.d)
        self.layers = [
            {kind: self._linear(kind, *shapes[kind]) for kind in KINDS if kind != "head"} for _ in range(self.d.layers)
        ]
        self.head = self._linear("head", *shapes["head"])

    def _linear(self, kind: str, n: int, k: int) -> Linear:
        name, setting = self.plan.op(kind), self.setting
        if name == BF16:
            weight: Tensors = (torch.randn(n, k, device=setting.device, dtype=setting.dtype).mul_(0.02),)
            return Linear(op=None, weight=weight, dtype=setting.dtype)
        op = BY_NAME[name]
        return Linear(op=op, weight=candidates.make_weight(op, Case(m=1, n=n, k=k), setting), dtype=setting.dtype)

    def bytes(self) -> int:
        """Of all linear layers."""
        linears = [self.head, *(linear for layer in self.layers for linear in layer.values())]
        return sum(t.numel() * t.element_size() for linear in linears for t in linear.weight)

    def all_of(self, kind: str) -> list[Linear]:
        """The layers of a kind."""
        return [self.head] if kind == "head" else [layer[kind] for layer in self.layers]


class Context:
    """What all plans share: embedding, norms, rotary tables, the cache."""

    def __init__(self, setting: Setting) -> None:
        d, self.setting = setting.decoder, setting
        self.d = d
        like: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
        self.embedding = torch.randn(d.vocabulary, d.hidden, **like)
        self.norm = torch.ones(d.hidden, **like)
        room = -(-(d.prompt + 1) // 16) * 16
        self.cache = torch.randn(d.layers, 2, max(d.step_batches), d.kv_heads, room, d.head, **like)
        frequencies = ROPE_BASE ** (-torch.arange(0, d.head, 2, device=setting.device) / d.head)
        angles = torch.arange(d.prompt + 1, device=setting.device)[:, None] * frequencies
        self.cos, self.sin = angles.cos().to(setting.dtype), angles.sin().to(setting.dtype)

    def rotated(self, x: Tensor, positions: slice) -> Tensor:
        """x [T, heads, head] at consecutive positions, or all at one."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


Compute = Callable[[str, int, Tensor | Codes], Tensor]


class Run:
    """One forward pass of a model in a phase."""

    def __init__(self, context: Context, phase: Phase, plan: Plan) -> None:
        self.context, self.phase, self.plan, self.d = context, phase, plan, context.d
        self.tokens = torch.randint(0, self.d.vocabulary, (phase.rows,), device=context.setting.device)

    def forward(self, compute: Compute) -> Tensor:
        """Logits' largest entries; `compute` is (kind, layer, x) -> that linear layer's output."""
        x, branch = F.embedding(self.tokens, self.context.embedding), None
        for number in range(self.d.layers):
            x, normed = self._normed(x, branch, "qkv")
            branch = compute("o", number, self._attention(number, compute("qkv", number, normed)))
            x, normed = self._normed(x, branch, "gate_up")
            branch = compute("down", number, self._activated(compute("gate_up", number, normed)))
        x, normed = self._normed(x, branch, "head", last=self.phase.prefill)
        return compute("head", 0, normed).argmax(-1)

    def _fused(self, kind: str) -> str | None:
        """The cast of the layer that comes next, where it is fused with what is before."""
        op = BY_NAME.get(self.plan.op(kind))
        return op.cast if self.plan.fused and op is not None and op.cast in ("int8", "fp8") else None

    def _normed(self, x: Tensor, branch: Tensor | None, kind: str, last: bool = False) -> tuple[Tensor, Tensor | Codes]:
        """The sum of x and the branch, and its norm."""
        if last:
            x, branch = x[-1:], None if branch is None else branch[-1:]
        cast = self._fused(kind)
        if cast is None:
            x = x if branch is None else x + branch
            return x, F.rms_norm(x, (self.d.hidden,), self.context.norm, EPS)
        from lowprec_kernels.triton_cast import quantize

        found = quantize(x, cast, norm_weight=self.context.norm, eps=EPS, residual=branch)  # type: ignore[arg-type]
        return (x if found.residual is None else found.residual), Codes(tensors=(found.codes, found.scale))

    def _activated(self, gate_up: Tensor) -> Tensor | Codes:
        cast = self._fused("down")
        if cast is None:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate) * up
        from lowprec_kernels.triton_cast import quantize

        found = quantize(gate_up, cast, silu=True)  # type: ignore[arg-type]
        return Codes(tensors=(found.codes, found.scale))

    def _attention(self, layer: int, qkv: Tensor) -> Tensor:
        d, rows = self.d, self.phase.rows
        q, k, v = qkv.view(rows, -1, d.head).split((d.heads, d.kv_heads, d.kv_heads), 1)
        keys, values = self.context.cache[layer, 0], self.context.cache[layer, 1]
        if self.phase.prefill:
            q, k = self.context.rotated(q, slice(0, rows)), self.context.rotated(k, slice(0, rows))
            keys[0, :, :rows], values[0, :, :rows] = k.transpose(0, 1), v.transpose(0, 1)
            y = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=True,
            )
            return y[0].transpose(0, 1).reshape(rows, -1)
        at = slice(d.prompt, d.prompt + 1)
        q, k = self.context.rotated(q, at), self.context.rotated(k, at)
        keys[:rows, :, d.prompt], values[:rows, :, d.prompt] = k, v
        # The queries that share a head of keys stand as so many positions of it: one token sees the whole cache.
        grouped = q.view(rows, d.kv_heads, d.heads // d.kv_heads, d.head)
        y = F.scaled_dot_product_attention(grouped, keys[:rows, :, : d.prompt + 1], values[:rows, :, : d.prompt + 1])
        return y.reshape(rows, -1)
