"""How the W8A8 kernels (`triton_w8a8.py`, `triton_w8a8_block.py`) may be launched: forms, candidates, what can run.

A kernel has two families: one for operands and devices that tensor descriptors serve, and one, named `-pointer`, for
the others; `tma_reason` says which and why. Their candidates, by rows m of x:

    m <= 64     swap: w in tiles of 64 or 128 rows, K split until there are about two blocks per processor
    m <= 256    tiles of 64 or 128 rows of x, split where they are fewer than processors
    more        persistent tiles, ordered by an estimate of the time: waves x (products + traffic of a tile)

The estimate counts a tile's traffic as `TRAFFIC` products per row: 128 x 256 is worth it where it fills the last wave.

Shared memory of a block, seen in compiled kernels of Triton 3.6 and 3.9 for sm_90: the stages of the pipeline; with
tensor descriptors also what is on its way out, since the next tile's loads are under way by then. Registers of a thread
(sm_90, of 255): 128 x 256 with 8 warps 250, 128 x 128 with 4 warps 231, with 8 warps 128 and, with block scales, 187.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lowprec_kernels.tuning import Config, Family, Problem, config_for

TMA_ALIGNMENT = 16
FORMS = ("pointer", "swap", "tma")
SMALL_M = 64
MEDIUM_M = 256
# An H100 has 132; only the order of the candidates depends on it.
TYPICAL_PROCESSORS = 132
SHARED_BYTES_OF_A_PROCESSOR = 228 << 10
TRAFFIC = 64
# Barriers, and vectors on their way between layouts.
OVERHEAD = 1024
# A split shorter than this many bytes of K is all start and end.
SHORTEST_SPLIT = 1024
MOST_SPLITS = 8
MOST_PARTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class W8A8Family(Family):
    """A family whose resource model knows the forms.

    Attributes:
        halves: whether the tma form stores a tile in two halves.
    """

    halves: bool

    def shared_bytes(self, config: Config) -> float:
        """Shared memory of a block: the stages and, with tensor descriptors, results on their way out."""
        stages = Family.shared_bytes(self, config)
        results = config.block_m * config.block_n
        if config.form != "tma":
            # Float32 results change their layout where the stages were.
            return max(stages + OVERHEAD, 4 * results)
        return stages + (results if self.halves else 2 * results) + 2 * OVERHEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Families:
    """A kernel's candidates with and without tensor descriptors."""

    tma: W8A8Family
    pointer: W8A8Family


Tile = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiles:
    """Tiles to try: block_m, block_n, block_k, warps, stages.

    Attributes:
        swap: by rows of x up to 64, without block_m.
        medium, large: the pointer form, up to 256 rows and beyond.
        tma: the form tma.
    """

    swap: dict[int, tuple[tuple[int, int, int, int], ...]]
    medium: tuple[Tile, ...]
    large: tuple[Tile, ...]
    tma: tuple[Tile, ...]


def _tiles(config: Config, problem: Problem) -> int:
    return int(triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n))


def _estimate(config: Config, problem: Problem) -> int:
    """Time in arbitrary units: whole waves of tiles, each products and traffic."""
    waves = math.ceil(_tiles(config, problem) * config.split_k / TYPICAL_PROCESSORS)
    tile = config.block_m * config.block_n + TRAFFIC * (config.block_m + config.block_n)
    return waves * tile // config.split_k


def _with_splits(config: Config, problem: Problem, *, blocks: int = 2) -> list[Config]:
    """`config` with K split so that there are about `blocks` blocks per processor, then half and twice as often."""
    # Who adds the splits has a part of each in registers.
    sums = config.block_m * config.block_n // (32 * config.warps)
    most = min(MOST_SPLITS, MOST_PARTS // sums, max(1, problem.k // SHORTEST_SPLIT))
    wanted = blocks * TYPICAL_PROCESSORS // _tiles(config, problem)
    guess = 1
    while guess * 2 <= min(most, wanted):
        guess *= 2
    splits = dict.fromkeys(s for s in (guess, guess // 2, guess * 2) if 1 <= s <= most)
    return [replace(config, split_k=s) for s in splits]


def _plain(tile: Tile, form: str, group_m: int = 8) -> Config:
    m, n, k, warps, stages = tile
    return Config(block_m=m, block_n=n, block_k=k, warps=warps, stages=stages, group_m=group_m, form=form)


def _swapped(tiles: Tiles, problem: Problem) -> list[Config]:
    rows = next(end for end in tiles.swap if problem.m <= end)
    found = [_plain((rows, *tile), "swap", group_m=1) for tile in tiles.swap[rows]]
    return [split for config in found for split in _with_splits(config, problem)]


def _by_pointers(tiles: Tiles, problem: Problem) -> list[Config]:
    if problem.m <= SMALL_M:
        return _swapped(tiles, problem)
    if problem.m <= MEDIUM_M:
        found = [_plain(tile, "pointer") for tile in tiles.medium]
        found = [split for config in found for split in _with_splits(config, problem, blocks=1)]
    else:
        found = [_plain(tile, "pointer") for tile in tiles.large]
    return sorted(found, key=lambda c: _estimate(c, problem))


def _by_descriptors(tiles: Tiles, problem: Problem) -> list[Config]:
    if problem.m <= SMALL_M:
        return _swapped(tiles, problem)
    found = [_plain(tile, "tma") for tile in tiles.tma]
    pointers = _by_pointers(tiles, problem)
    if problem.m <= MEDIUM_M:
        return sorted(found + pointers, key=lambda c: _estimate(c, problem))
    others = [_plain(tiles.tma[0], "tma", group_m=group) for group in (4, 16)]
    return [*sorted(found, key=lambda c: _estimate(c, problem)), *others, *pointers[:2]]


def _families(name: str, tiles: Tiles, *, halves: bool) -> Families:
    def family(suffix: str, candidates: Callable[[Tiles, Problem], Sequence[Config]]) -> W8A8Family:
        chosen = functools.partial(candidates, tiles)
        return W8A8Family(name=name + suffix, candidates=chosen, bytes_x=1, bytes_w=1, halves=halves)

    return Families(tma=family("", _by_descriptors), pointer=family("-pointer", _by_pointers))


ROW_TILES = Tiles(
    swap={
        16: ((64, 256, 4, 4), (64, 128, 4, 6), (128, 128, 4, 5), (128, 256, 8, 3)),
        32: ((64, 256, 4, 4), (64, 128, 4, 6), (128, 128, 4, 5), (128, 256, 8, 3)),
        # The sums of all splits are added at once: a wide tile needs the registers of eight warps.
        64: ((64, 256, 4, 4), (64, 128, 4, 6), (128, 128, 8, 5), (128, 256, 8, 3)),
    },
    medium=((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (64, 64, 128, 4, 4)),
    # The narrow steps fit the shared memory of sm_80, sm_89 and gfx942.
    large=((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4)),
    tma=(
        (128, 256, 128, 8, 4),
        (128, 256, 128, 8, 3),
        (128, 128, 128, 4, 3),
        (256, 128, 128, 8, 4),
        (128, 128, 128, 8, 4),
        (128, 64, 128, 4, 4),
    ),
)
# A step is a block of scales, so block_k is 128 and block_n divides it; the sums take twice the registers.
BLOCK_TILES = Tiles(
    swap={
        16: ((64, 128, 4, 6), (128, 128, 4, 5), (64, 128, 4, 4)),
        32: ((64, 128, 4, 6), (128, 128, 4, 5), (64, 128, 4, 4)),
        64: ((64, 128, 4, 6), (128, 128, 8, 5), (64, 128, 4, 4)),
    },
    medium=((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (64, 64, 128, 4, 4)),
    large=((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 3), (64, 64, 128, 4, 3)),
    tma=((128, 128, 128, 8, 4), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (128, 128, 128, 8, 3)),
)
INT8 = _families("w8a8-int8", ROW_TILES, halves=True)
FP8 = _families("w8a8-fp8", ROW_TILES, halves=True)
FP8_BLOCK = _families("w8a8-fp8-block", BLOCK_TILES, halves=False)
FAMILIES = tuple(family for pair in (INT8, FP8, FP8_BLOCK) for family in (pair.tma, pair.pointer))


@functools.cache
def _device_of(index: int) -> tuple[str, tuple[int, int], int]:
    """Name, compute capability and processors of a device; no capability on AMD, whose numbers mean other things."""
    properties = torch.cuda.get_device_properties(index)
    capability = (0, 0) if torch.version.hip is not None else (properties.major, properties.minor)
    return properties.name, capability, int(properties.multi_processor_count)


def persistent_programs(x: Tensor, tiles: int, config: Config, shared_bytes: float) -> int:
    """Programs of a persistent launch: one per place on the device, at most one per tile."""
    if not x.is_cuda:
        # The interpreter: few enough that a program walks over several tiles.
        return min(tiles, 3)
    # Two blocks of four warps have registers enough; the hardware keeps 1 KB of each block's shared memory.
    twice = config.form == "tma" and config.warps == 4 and 2 * (shared_bytes + 1024) <= SHARED_BYTES_OF_A_PROCESSOR
    return min(tiles, _device_of(x.device.index)[2] * (2 if twice else 1))


def fp8_reason(x: Tensor) -> str | None:
    """None, or why x's device cannot multiply E4M3."""
    if x.is_cuda and torch.version.hip is None:
        name, capability, _ = _device_of(x.device.index)
        if capability < (8, 9):
            return f"E4M3 needs sm_89 or later, {name} has none: use INT8"
    return None


def tma_reason(x: Tensor, w: Tensor, out: Tensor) -> str | None:
    """None, or why x [M, K], w [N, K], out [M, N] cannot be read and written through tensor descriptors."""
    if x.is_cuda:
        name, capability, _ = _device_of(x.device.index)
        if capability < (9, 0):
            return f"tensor descriptors need sm_90 or later, not {name}"
    if out.itemsize != 2:
        return f"results are stored as 2-byte numbers, not as {out.dtype}"
    if x.shape[1] == 0:
        return "K is 0"
    for name, t in (("x", x), ("w", w), ("out", out)):
        if t.data_ptr() % TMA_ALIGNMENT or t.stride(0) * t.itemsize % TMA_ALIGNMENT:
            return f"the rows of {name} do not all begin at multiples of {TMA_ALIGNMENT} bytes"
    return None


def k_major(codes: Tensor) -> Tensor:
    """Codes [rows, K] with K contiguous; copied only where it is not."""
    return codes if codes.stride(1) == 1 or codes.shape[1] == 1 else codes.contiguous()


def choose(
    families: Families, x: Tensor, w: Tensor, out: Tensor, config: Config | None, scale_block: int | None = None
) -> Config:
    """The configuration to launch with: the tuned one of the family that can run, or the one that was asked for.

    Args:
        scale_block: columns that share a scale, where that is not a whole row.

    Raises:
        ValueError: `config` cannot run, with the reason.
    """
    (m, k), n = x.shape, w.shape[0]
    obstacle = tma_reason(x, w, out)
    if config is None:
        family = families.tma if obstacle is None else families.pointer
        return config_for(family, Problem(m=m, n=n, k=max(k, 1)), x.device)
    if config.form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {config.form!r}")
    if config.split_k > 1:
        obstacle = "persistent tiles do not split K"
    if config.form == "tma" and obstacle is not None:
        raise ValueError(f"{config}: {obstacle}; use form pointer")
    if scale_block is not None and (config.block_k != scale_block or scale_block % config.block_n):
        raise ValueError(f"{config}: block_k must be {scale_block} and block_n divide it, as the scales' blocks do")
    return config


def descriptors(x: Tensor, w: Tensor, out: Tensor, config: Config, columns: int) -> tuple[Any, Any, Any]:
    """Descriptors of x, w and out, which is stored by `columns`."""
    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(out, [config.block_m, columns]),
    )
