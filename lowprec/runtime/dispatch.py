"""Chooses the kernel of a layer: once, when the layer is built, for each bucket of rows M, from measured times.

    bucket        1        2-16       17-128     > 128
    measured at   1        8          64         256        (where the caller's samples have no M of the bucket)

`KernelTable` takes the samples that a target measured. A shape that was not measured takes the choice of the nearest
measured shape of the same scheme and bucket (distance in log N and log K: a group is timed fused, its layers run
one by one); where nothing was measured for scheme and bucket, it measures now and says so in the log. The slow
reference is never chosen automatically. An explicit choice never falls back.

The two phases of a decoder differ in what they wait for. Many rows (prefill) are worth rounding: INT8 inputs meet the
weights in the processor's integer instructions. Few rows (decode) wait for the weights, whichever the inputs are, so
there the forms that take inputs in 16 bits take part as well, where a scheme rounds them to 8: same codes, same scales,
no stored byte more. They are named with `UNROUNDED`; what they lose beside the scheme, which is scored as prefill
computes it, parity tells.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, per_block, resolve
from lowprec.formats.asymmetric import offset_codes
from lowprec.formats.two_level import is_by_rows, stored_multiples
from lowprec.records import CostSample, Scheme
from lowprec.registry import closest
from lowprec.runtime.measure import measure_kernels
from lowprec_kernels.kernel import ActivationKind, Kernel, Operands, WeightKind, kernels_for
from lowprec_kernels.packing import pack_int4

log = logging.getLogger(__name__)

BUCKET_LIMITS = (1, 16, 128)
BUCKET_M = (1, 8, 64, 256)
REFERENCE = "reference"
FEW = BUCKET_LIMITS[1]
"""Most rows that may be computed without rounding inputs where the scheme rounds them."""
UNROUNDED = "-a16"
"""How the names of such forms end."""


def bucket_of(m: int) -> int:
    """Index of the bucket that `m` rows fall into."""
    return sum(m > limit for limit in BUCKET_LIMITS)


def fewest_rows(m: int) -> int:
    """The smallest number of rows that the kernel for `m` rows is chosen for."""
    bucket = bucket_of(m)
    return BUCKET_LIMITS[bucket - 1] + 1 if bucket else 1


def kinds(scheme: Scheme) -> tuple[WeightKind, ActivationKind | None]:
    """The kinds of weight and activation that kernels are asked for: "int4-g64" is "int4", "int8-static" "int8".

    Activations in blocks keep their name, which no kernel here answers to.
    """
    weight = "bf16" if scheme.weight is None else weight_kind(scheme.weight)
    activation = scheme.activation
    if activation is not None and not per_block(scheme):
        activation = activation.split("-")[0]
    return weight, cast(ActivationKind | None, activation)


def weight_kind(fmt: str) -> WeightKind:
    """The kind that kernels know a weight format by: INT3's and INT6's codes are some of those of INT4 and INT8."""
    kind = fmt.split("-")[0]
    return cast(WeightKind, {"int3": "int4", "int6": "int8"}.get(kind, kind))


def group_size_of(scheme: Scheme) -> int | None:
    """Group size of a resolved scheme, None per channel and for bf16."""
    return None if scheme.weight is None else WEIGHT_FORMATS[scheme.weight].group_size


def operands_of(
    weight: QuantizedWeight, bias: Tensor | None = None, activation_scale: Tensor | None = None
) -> Operands:
    """A solved weight in the kernels' terms; codes of 4 bits or fewer are packed."""
    kind = weight_kind(weight.format)
    codes, zero = weight.codes, None
    if not WEIGHT_FORMATS[weight.format].symmetric:
        codes, zero = offset_codes(weight)
    codes = pack_int4(codes) if kind == "int4" else codes
    return Operands(
        weight=kind,
        codes=codes.contiguous(),
        scale=weight.scale.to(torch.float32).contiguous(),
        bias=bias,
        activation_scale=None if activation_scale is None else activation_scale.to(torch.float32),
        zero=zero,
        group_size=WEIGHT_FORMATS[weight.format].group_size,
        multiples=stored_multiples(weight.format, weight.scale),
    )


def usable(scheme: Scheme, n: int, k: int, device: str = "cpu") -> tuple[dict[str, Kernel], tuple[str, ...]]:
    """The forms that can run a resolved `scheme` at [n, k] on `device`, and why the others cannot.

    The reference is among the forms; `automatic` leaves it out.
    """
    forms = forms_of(scheme, device)
    reasons = {name: kernel.supports(1, n, k, group_size_of(scheme)) for name, kernel in forms.items()}
    return (
        {name: kernel for name, kernel in forms.items() if reasons[name] is None},
        tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None),
    )


def forms_of(scheme: Scheme, device: str) -> dict[str, Kernel]:
    """The forms that compute a resolved `scheme` on `device`, at any shape."""
    found = kernels_for(*kinds(scheme), device)
    return {name: form for name, form in found.items() if is_by_rows(scheme.weight) or not form.by_rows}


def automatic(scheme: Scheme, n: int, k: int, device: str = "cpu", rows: int | None = None) -> list[Kernel]:
    """The forms to choose from for `rows` rows; None: those that compute the scheme with any number of them.

    Raises:
        UnsupportedError: there is none but the slow reference.
    """
    forms, reasons = usable(scheme, n, k, device)
    found = [kernel for name, kernel in forms.items() if name != REFERENCE]
    if found and rows is not None and rows <= FEW:
        found += _unrounded(scheme, n, k, device)
    if not found:
        raise UnsupportedError(
            f"no kernel runs scheme {scheme.name} at N = {n}, K = {k} on {device}; "
            f"ask for kernel {REFERENCE!r} to run it slowly",
            reasons or (f"no kernel on {device} computes {scheme.name}",),
        )
    return found


def _unrounded(scheme: Scheme, n: int, k: int, device: str) -> list[Kernel]:
    """The forms of the scheme's weights that leave inputs as they are, where the scheme rounds them."""
    if scheme.activation is None:
        return []
    forms, _ = usable(dataclasses.replace(scheme, activation=None), n, k, device)
    return [_for_few_rows(form) for name, form in forms.items() if name != REFERENCE]


@functools.cache
def _for_few_rows(form: Kernel) -> Kernel:
    """The same under the name that it has where a scheme rounds inputs; one object, so that it lays out once."""
    return dataclasses.replace(form, name=f"{form.name}{UNROUNDED}")


def kernel_named(name: str, scheme: Scheme, n: int, k: int, device: str = "cpu") -> Kernel:
    """The kernel asked for.

    Raises:
        ConfigError: no kernel of that name computes the scheme.
        UnsupportedError: it cannot run this shape here.
    """
    forms = forms_of(scheme, device)
    if name.endswith(UNROUNDED):
        raise ConfigError(f"kernel {name!r} computes few rows alone, and is chosen by itself: give one for any number")
    if name not in forms:
        raise ConfigError(f"unknown kernel {name!r} for scheme {scheme.name}: {closest(name, list(forms))}")
    reason = forms[name].supports(1, n, k, group_size_of(scheme))
    if reason is not None:
        raise UnsupportedError(f"kernel {name} cannot run scheme {scheme.name} at N = {n}, K = {k}", (reason,))
    return forms[name]


class KernelTable:
    """Kernel choices by scheme, shape and bucket.

    Args:
        samples: what a target measured on this machine; modelled ones are ignored.
        device: device type that the layers run on.
        dtype: of the activations, for what has to be measured here.
    """

    def __init__(
        self, samples: Iterable[CostSample] = (), device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._known: dict[tuple[str, int], dict[tuple[int, int], str]] = {}
        fastest: dict[tuple[str, int, int, int], CostSample] = {}
        for sample in samples:
            key = (sample.scheme, bucket_of(sample.m), sample.n, sample.k)
            if sample.origin == "measured" and (key not in fastest or sample.p50_us < fastest[key].p50_us):
                fastest[key] = sample
        for (scheme, bucket, n, k), sample in fastest.items():
            self._known.setdefault((scheme, bucket), {})[(n, k)] = sample.kernel

    def select(self, scheme: Scheme, n: int, k: int) -> tuple[Kernel, ...]:
        """One kernel for each bucket.

        Raises:
            UnsupportedError: the scheme does not fit K, or no kernel runs it here.
        """
        scheme = resolve(scheme, k)
        return tuple(self._one(scheme, n, k, bucket) for bucket in range(len(BUCKET_M)))

    def _one(self, scheme: Scheme, n: int, k: int, bucket: int) -> Kernel:
        forms = {kernel.name: kernel for kernel in automatic(scheme, n, k, self.device, BUCKET_M[bucket])}
        if len(forms) == 1:
            return next(iter(forms.values()))
        shapes = self._known.setdefault((scheme.name, bucket), {})
        near = sorted(shapes, key=lambda s: (abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)), s))
        for shape in near:
            if shapes[shape] in forms:
                return forms[shapes[shape]]
        m = BUCKET_M[bucket]
        found = measure_kernels(
            {scheme.name: list(forms.values())}, {scheme.name: scheme}, n, k, m,
            dtype=self.dtype, seconds_per_candidate=0.03, device=self.device,
        )  # fmt: skip
        name = min(found, key=lambda key: found[key].p50_us)[1]
        log.info("kernel %s chosen for %s at N=%d K=%d M=%d by timing it now", name, scheme.name, n, k, m)
        shapes[(n, k)] = name
        return forms[name]


def choose(kernels: "KernelTable | str", scheme: Scheme, n: int, k: int, device: str = "cpu") -> tuple[Kernel, ...]:
    """One kernel for each bucket: from a table, or the one that is named for all of them."""
    if isinstance(kernels, KernelTable):
        return kernels.select(scheme, n, k)
    return (kernel_named(kernels, resolve(scheme, k), n, k, device),) * len(BUCKET_M)
