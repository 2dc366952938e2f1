"""What is run: the shapes and numbers of rows, and how long anything may take, on a GPU and in the smoke run.

The smoke run goes through every stage on CPU tensors in Triton's interpreter, at tiny sizes: it finds what would stop a
run on a machine with a GPU. Its numbers mean nothing, and FP8 casts are wrong in it (the interpreter rounds so).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

BUILT_IN_OUT = "bench/results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A weight [n, k]."""

    name: str
    n: int
    k: int


# Most wanted first. Llama-3-8B: hidden 4096, 32 + 2 x 8 heads of 128, intermediate 14336. Qwen3-32B: hidden 5120,
# 64 + 2 x 8 heads of 128, intermediate 25600. "wide" is 12288 inputs to 73728 outputs.
SHAPES = (
    Shape(name="8192", n=8192, k=8192),
    Shape(name="llama3-8b gate_up", n=28672, k=4096),
    Shape(name="llama3-8b down", n=4096, k=14336),
    Shape(name="llama3-8b qkv", n=6144, k=4096),
    Shape(name="llama3-8b o", n=4096, k=4096),
    Shape(name="16384", n=16384, k=16384),
    Shape(name="wide", n=73728, k=12288),
    Shape(name="qwen3-32b gate_up", n=51200, k=5120),
    Shape(name="qwen3-32b down", n=5120, k=25600),
    Shape(name="qwen3-32b qkv", n=10240, k=5120),
    Shape(name="qwen3-32b o", n=5120, k=8192),
)
TINY = (Shape(name="tiny", n=128, k=256),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a decoder, and how it is run: `step_batches` sequences at once, `prompt` tokens each in the cache."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    intermediate: int = 14336
    vocabulary: int = 128256
    prompt: int = 512
    step_batches: tuple[int, ...] = (1, 64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A layer of experts: DeepSeek-V3's."""

    experts: int = 256
    top_k: int = 8
    hidden: int = 7168
    intermediate: int = 2048
    tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Sizes and limits of a run.

    Attributes:
        rotate_bytes: weights of one kind that are gone through before any is read again, so that none is cached.
        graph_us: a captured graph takes at least so long, so that its launch does not count.
        sample_ms: time that a candidate is measured for.
        stall_seconds: a worker that begins nothing new for so long is hanging, and is ended.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    shapes: tuple[Shape, ...] = SHAPES
    compare_shapes: tuple[Shape, ...] = SHAPES
    tune_rows: tuple[int, ...] = (1, 16, 64, 256, 4096, 8, 32, 128, 512, 1024)
    compare_rows: tuple[int, ...] = (1, 16, 64, 4096, 128, 512, 4, 8192)
    check_rows: tuple[int, ...] = (1, 16, 64, 128, 512, 3, 17, 100)
    check_shape: tuple[int, int] = (1024, 2048)
    ragged_shape: tuple[int, int] = (999, 1504)
    cast_shapes: tuple[tuple[int, int], ...] = ((16384, 8192), (16384, 4096))
    square: int = 8192
    rotate_bytes: int = 256 << 20
    graph_us: float = 200.0
    sample_ms: float = 30.0
    workers: int = 16
    stall_seconds: float = 30.0
    decoder: Decoder = field(default_factory=Decoder)
    moe: Moe = field(default_factory=Moe)

    @property
    def smoke(self) -> bool:
        """Whether nothing is measured."""
        return self.device == "cpu"


# float16: Triton's interpreter multiplies bfloat16 wrongly.
SMOKE = Setting(
    device="cpu",
    dtype=torch.float16,
    shapes=TINY,
    compare_shapes=TINY,
    tune_rows=(1, 16),
    compare_rows=(1, 16),
    check_rows=(1, 17),
    check_shape=(128, 256),
    ragged_shape=(72, 160),
    cast_shapes=((32, 256),),
    square=128,
    rotate_bytes=1 << 16,
    graph_us=0.0,
    sample_ms=0.0,
    workers=2,
    stall_seconds=300.0,
    decoder=Decoder(
        layers=1,
        hidden=128,
        heads=4,
        kv_heads=2,
        head=32,
        intermediate=256,
        vocabulary=128,
        prompt=16,
        step_batches=(1, 2),
    ),
    moe=Moe(experts=4, top_k=2, hidden=128, intermediate=128, tokens=6),
)


def setting(smoke: bool) -> Setting:
    """The setting of a run."""
    return SMOKE if smoke else Setting()


def out_folder() -> Path:
    """Where results go: OUT, or the folder of results."""
    return Path(os.environ.get("OUT", BUILT_IN_OUT))
