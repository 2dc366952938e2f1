"""Schemes: which weight format meets which activation format, under the field's names.

A scheme changes the numbers; two kernels that compute the same numbers are forms of one scheme.
`w4a16`, `w4a8-*` and `w3a16` without a group size mean: the largest of 128, 64, 32 that divides K. `w4a16-asym` is
INT4 with zero points. `w4a16-rows25` is for tables of a vocabulary alone: INT4 with the 25 % of rows that matter most
in INT8 (`lowprec.formats.rows`). `w4a8-block` and `w8a8-block` round inputs to INT8 block by block
(`lowprec.formats.block`): the blocks of INT4 weights are their groups, those of INT8 weights are 128 long;
`w4a8-block64` and `w8a8-block64` have blocks of 64, whatever the weights have. `w4a8-two-level` is INT4 that is INT8
within each row (`lowprec.formats.two_level`). What keys and values of attention are stored in (`CacheFormat`) is a
scheme to a plan as well, under the format's name; it has no weights and no inputs, and is for groups of caches alone.
"""

from collections.abc import Iterable
from typing import Final

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats.base import CACHE_FORMATS, WEIGHT_FORMATS
from lowprec.records import Scheme
from lowprec.registry import closest

GROUP_SIZES = (128, 64, 32)
ROW_PERCENTS = (6, 12, 25, 50)
ROWS = "-rows"
ASYMMETRIC = "-asym"
BLOCK = "-block"
TOKEN = "int8-token"
FIXED_BLOCK = 64
TWO_LEVEL = "-two-level"
CACHE_FAMILY: Final = "kv8"


def _schemes() -> dict[str, Scheme]:
    found = [
        Scheme(name="bf16", family="bf16", weight=None, activation=None),
        Scheme(name="w8a8-fp8", family="fp8", weight="fp8", activation="fp8-token"),
        Scheme(name="w8a8-int8", family="int8", weight="int8", activation="int8-token"),
        Scheme(name="w8a16", family="int8", weight="int8", activation=None),
        Scheme(name="w6a16", family="int6", weight="int6", activation=None),
        Scheme(name=f"w8a8{BLOCK}", family="int8", weight="int8", activation=f"int8{BLOCK}{GROUP_SIZES[0]}"),
        Scheme(name="w8a8-fp8-static", family="fp8", weight="fp8", activation="fp8-static"),
        Scheme(name="w8a8-int8-static", family="int8", weight="int8", activation="int8-static"),
    ]
    for prefix, activation in (("w4a16", None), ("w4a8-int8", TOKEN), ("w4a8-fp8", "fp8-token")):
        found.append(Scheme(name=prefix, family="int4", weight="int4", activation=activation))
        found += [
            Scheme(name=f"{prefix}-g{g}", family="int4", weight=f"int4-g{g}", activation=activation)
            for g in GROUP_SIZES
        ]
    for size in ("", *(f"-g{g}" for g in GROUP_SIZES)):
        for percent in ROW_PERCENTS:
            rows = f"{size}{ROWS}{percent}"
            found.append(Scheme(name=f"w4a16{rows}", family="int4", weight=f"int4{rows}", activation=None))
        zero = f"{size}{ASYMMETRIC}"
        found.append(Scheme(name=f"w4a16{zero}", family="int4-asym", weight=f"int4{zero}", activation=None))
        found.append(Scheme(name=f"w3a16{size}", family="int3", weight=f"int3{size}", activation=None))
        levels = f"int4{TWO_LEVEL}"
        found.append(
            Scheme(name=f"w4a8{TWO_LEVEL}{size}", family="int4-two-level", weight=f"{levels}{size}", activation=TOKEN)
        )
        # Without a size it is only a name for the one that fits.
        blocks = f"int8{BLOCK}{size.removeprefix('-g') or GROUP_SIZES[0]}"
        found.append(Scheme(name=f"w4a8{BLOCK}{size}", family="int4", weight=f"int4{size}", activation=blocks))
        found.append(Scheme(name=f"w4a8{BLOCK}{zero}", family="int4-asym", weight=f"int4{zero}", activation=blocks))
    fixed = f"{BLOCK}{FIXED_BLOCK}"
    found.append(Scheme(name=f"w8a8{fixed}", family="int8", weight="int8", activation=f"int8{fixed}"))
    found += [
        Scheme(name=f"w4a8{fixed}{size}", family="int4", weight=f"int4{size}", activation=f"int8{fixed}")
        for size in ("", *(f"-g{g}" for g in GROUP_SIZES if g % FIXED_BLOCK == 0))
    ]
    return {scheme.name: scheme for scheme in found}


SCHEMES: dict[str, Scheme] = _schemes()


def scheme_named(name: str) -> Scheme:
    """The scheme called `name`, or that of a cache format; ConfigError with a suggestion when there is none."""
    if name in SCHEMES:
        return SCHEMES[name]
    if name in CACHE_FORMATS:
        return Scheme(name=name, family=CACHE_FAMILY, weight=None, activation=None)
    raise ConfigError(f"unknown scheme {name!r}: {closest(name, list(SCHEMES))}")


def schemes_of_family(family: str) -> list[Scheme]:
    """The dynamic schemes that the command line's `--schemes fp8,int8,int4` stand for."""
    families = sorted({s.family for s in SCHEMES.values()})
    if family not in families:
        raise ConfigError(f"unknown scheme family {family!r}: {closest(family, families)}")
    return [s for s in SCHEMES.values() if s.family == family and not s.name.endswith("-static") and "-g" not in s.name]


def per_block(scheme: Scheme) -> bool:
    """Whether inputs are rounded block by block, which onnxruntime and OpenVINO do."""
    return scheme.activation is not None and BLOCK in scheme.activation


def for_tables(scheme: Scheme) -> bool:
    """Whether the scheme is for tables of a vocabulary alone."""
    return ROWS in scheme.name


def schemes_named(names: Iterable[str]) -> list[Scheme]:
    """The quantising schemes that names of schemes and families stand for, each once, in order.

    Raises:
        ConfigError: a name that is neither; or nothing but bf16.
    """
    families = {s.family for s in SCHEMES.values()}
    found: list[Scheme] = []
    for name in names:
        if name not in families and name not in SCHEMES:
            raise ConfigError(f"unknown scheme {name!r}: {closest(name, [*families, *SCHEMES])}")
        found += schemes_of_family(name) if name in families else [SCHEMES[name]]
    quantising = list(dict.fromkeys(s for s in found if s.weight is not None))
    if not quantising:
        raise ConfigError("no scheme may be chosen: give families such as fp8,int8,int4 or names of schemes")
    return quantising


def resolve(scheme: Scheme, k: int) -> Scheme:
    """`scheme` with its group size settled for rows of `k` weights.

    Raises:
        UnsupportedError: no group size, or not the one asked for, divides `k`.
    """
    if scheme.weight is None:
        return scheme
    if scheme.weight in WEIGHT_FORMATS:
        reason = WEIGHT_FORMATS[scheme.weight].fits(k)
        if reason:
            raise UnsupportedError(f"scheme {scheme.name} does not fit K = {k}", (reason,))
        return scheme
    prefix = scheme.name.partition(ROWS)[0].removesuffix(ASYMMETRIC)
    sized = {size: f"{prefix}-g{size}{scheme.name.removeprefix(prefix)}" for size in GROUP_SIZES}
    known = tuple(size for size, name in sized.items() if name in SCHEMES)
    for size in known:
        if k % size == 0:
            return SCHEMES[sized[size]]
    raise UnsupportedError(
        f"scheme {scheme.name} does not fit K = {k}", (f"none of the group sizes {known} divides {k}",)
    )


def with_static_activation(scheme: Scheme) -> Scheme:
    """The static twin of a dynamic w8a8 scheme, for targets that want calibrated ranges."""
    return scheme_named(f"{scheme.name}-static")
