"""What a target is: a runtime, or a device to plan for, that can say what it runs and how long that takes.

A target whose runtime loads files of its own is a `RuntimeTarget` besides. It writes them from an artefact, and what it
loads from them is a module that is called as transformers' models are: so the same clock times it, and the same
functions judge it, as if it were computed by torch.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lowprec.errors import UnsupportedError
from lowprec.formats import CACHE_FORMATS, WEIGHT_FORMATS, QuantizedWeight, resolve
from lowprec.records import ArtefactForm, CachePlace, CostSample, Deployed, Origin, Scheme
from lowprec.registry import Registry
from lowprec_kernels.timing import Timing

BF16_BYTES = 2
Progress = Callable[[int, int], None]


class Target(Protocol):
    """A runtime or device that a plan is made for."""

    @property
    def name(self) -> str:
        """Name that plans and the command line use."""

    @property
    def device(self) -> str:
        """What the times belong to, for the report."""

    @property
    def origin(self) -> Origin:
        """Whether `time` measures or models."""

    @property
    def baseline(self) -> str:
        """What the same runtime does without quantisation, for the report."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Families and names of schemes that it offers where none are asked for."""

    def require(self) -> None:
        """Raises ConfigError, with the remedy, when the target cannot be used on this machine."""

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if a weight [n, k] can run in `scheme`, else the reason."""

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Output widths of the products that run the layers of one group, whose own output widths are `widths`."""

    def dense_bytes(self, own: int) -> int:
        """Bytes that it loads for a weight that is not quantised and that the model stores in `own` bytes."""

    def time(
        self,
        shapes: Sequence[tuple[int, int]],
        schemes: Sequence[Scheme],
        ms: Sequence[int],
        progress: Progress | None = None,
    ) -> list[CostSample]:
        """One sample for each (shape, scheme, M) that is supported: the best kernel's time, activations quantised.

        Args:
            shapes: (N, K) of the weights.
            schemes: as the caller names them; the samples carry these names (a group size is settled per shape).
            ms: rows of the activations.
            progress: called with (done, total) after each (shape, M).
        """


@runtime_checkable
class RuntimeTarget(Target, Protocol):
    """A target whose runtime loads files of its own: they are what is judged and timed."""

    @property
    def form(self) -> ArtefactForm:
        """What they are; also the name of their folder in a run, beside the artefact's."""

    def deploy(self, artefact: Path, out: Path) -> Deployed:
        """Writes the files of an artefact, checked.

        Raises:
            LowprecError: a model that the runtime cannot hold, with the reason; a folder that cannot be written.
        """

    def deploy_unquantised(self, module: nn.Module, out: Path) -> Deployed:
        """Writes those of a model of transformers as it is; `module` is not changed."""

    def layer_error(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> float:
        """||y - x' W^T|| / ||x' W^T|| of the runtime's y, for x [M, K] that is rounded to x' by a resolved `scheme`."""

    def load(self, path: Path, room: int) -> nn.Module:
        """A module with the model in `path` behind it, called with `input_ids` and the other arguments of transformers.

        Args:
            room: tokens that a decoder may go on with after the first call of a text.

        A decoder's answer has `logits`, and, with `use_cache`, `past_key_values` to go on from; an encoder's has
        `last_hidden_state`.
        """


@runtime_checkable
class ReadsAtOnce(Protocol):
    """What `RuntimeTarget.load` gives where texts are scored in steps, as decoding would see them."""

    def at_once(self) -> AbstractContextManager[None]:
        """Texts are read at once while open, as prompts are."""


@runtime_checkable
class CacheTarget(Target, Protocol):
    """A target whose KV cache may be kept in codes."""

    @property
    def offered_cache(self) -> str | None:
        """The cache format that it offers where nothing is asked for and time is the objective, None for none."""

    def keeps(self, fmt: str) -> str | None:
        """None if it can keep keys and values in the cache format `fmt`, else the reason."""

    def fits(self, module: nn.Module, places: Sequence[CachePlace]) -> str | None:
        """None if it can keep the keys and values of this very decoder in codes, else the reason."""

    def time_cache(
        self, place: CachePlace, formats: Sequence[str | None], batch: int, added: int, held: int
    ) -> list[CostSample]:
        """What it takes to store the keys (or the values) of `added` tokens in one layer that holds `held` before, and
        to hand out those of all: one sample for each format, None being what the model is kept in without one, which
        is called bf16. Where attention reads codes, half of what it takes is in it.

        The samples have m = batch x added, n = held + added, k = heads x width; `bytes` are those of all tokens.
        """


TARGETS: Registry[Target] = Registry("target", "lowprec.targets")


def weight_bytes(scheme: Scheme, n: int, k: int) -> int:
    """Stored bytes of a weight [n, k] with its scales, as a checkpoint holds it (bf16: 2 n k).

    Raises:
        UnsupportedError: the scheme does not fit K.
    """
    scheme = resolve(scheme, k)
    if scheme.weight is None:
        return BF16_BYTES * n * k
    return round(n * WEIGHT_FORMATS[scheme.weight].bytes_per_row(k))


def token_bytes(fmt: str | None, heads: int, width: int, own_bytes: int = BF16_BYTES) -> float:
    """Bytes of one token's keys, or values, in a layer; None is what is not rounded, `own_bytes` a number."""
    return own_bytes * heads * width if fmt is None else CACHE_FORMATS[fmt].bytes_per_token(heads, width)


def cache_sample(
    fmt: str | None, place: CachePlace, batch: int, added: int, held: int, kernel: str, timing: Timing, origin: Origin,
    own_bytes: int = BF16_BYTES,
) -> CostSample:  # fmt: skip
    """A sample as `CacheTarget.time_cache` gives it; `own_bytes` of a number that is not rounded."""
    return CostSample(
        op="cache",
        m=batch * added,
        n=held + added,
        k=place.heads * place.width,
        scheme=fmt or "bf16",
        kernel=kernel,
        p20_us=timing.p20_us,
        p50_us=timing.p50_us,
        p80_us=timing.p80_us,
        bytes=round(batch * (held + added) * token_bytes(fmt, place.heads, place.width, own_bytes)),
        origin=origin,
    )


def installed(package: str) -> str:
    """The version of a package, for what a report calls the device; also said where `require` would refuse."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def unfit(scheme: Scheme, k: int) -> str | None:
    """Why `scheme` cannot hold rows of `k` weights, None if it can."""
    try:
        resolve(scheme, k)
    except UnsupportedError as error:
        return "; ".join(error.reasons) or str(error)
    return None
