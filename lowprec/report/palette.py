"""What a scheme looks like: one colour per scheme, a short label for its cell, a pattern for variants.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), chosen to stay apart in every common form of
colour blindness; group sizes of one scheme differ in lightness, which everyone sees. Blues are INT8, a pale one INT6,
green is FP8, reds and yellows are INT4, violets INT3, and bf16 is a quiet grey, since it is what was left alone. Colour
is never the only carrier: cells have a label, variants (static activation scales, inputs in blocks, scales of two
levels, zero points, tables with rows in INT8) a hatch, and every mark its name in text.

Left out: a colour for every scheme that may ever exist. One without an entry here is drawn in a spare colour.
"""

import re
from dataclasses import dataclass

DARK_INK = "#15181c"
LIGHT_INK = "#ffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Fill colour, the ink readable on it, a label of at most two letters, and whether it is hatched."""

    fill: str
    ink: str
    label: str
    hatched: bool = False


ROWS, ZERO_POINTS, BLOCKS = "-rows", "-asym", re.compile(r"-block\d*|-two-level")
# Names without "-static", "-asym" and "-rows..."; inputs in blocks, and scales of two levels, are drawn as those by
# token, hatched. A group size only changes the lightness.
_FILLS = {
    "bf16": ("#b4bac2", DARK_INK, "16"),
    "w8a16": ("#56b4e9", DARK_INK, "8"),
    "w8a8-int8": ("#0072b2", LIGHT_INK, "8"),
    "w8a8-fp8": ("#009e73", DARK_INK, "F8"),
    "w6a16": ("#b3dcf2", DARK_INK, "6"),
    "w4a16": ("#d55e00", DARK_INK, "4"),
    "w4a16-g128": ("#8c3d00", LIGHT_INK, "4"),
    "w4a16-g64": ("#d55e00", DARK_INK, "4"),
    "w4a16-g32": ("#f0a500", DARK_INK, "4"),
    "w4a8-int8": ("#cc79a7", DARK_INK, "4"),
    "w4a8-int8-g128": ("#a0417a", LIGHT_INK, "4"),
    "w4a8-int8-g64": ("#cc79a7", DARK_INK, "4"),
    "w4a8-int8-g32": ("#e8b8d3", DARK_INK, "4"),
    "w4a8-fp8": ("#e4d83a", DARK_INK, "4"),
    "w4a8-fp8-g128": ("#a89d10", DARK_INK, "4"),
    "w4a8-fp8-g64": ("#e4d83a", DARK_INK, "4"),
    "w4a8-fp8-g32": ("#f4efa0", DARK_INK, "4"),
    "kv8-int8": ("#9ad4f5", DARK_INK, "K8"),
    "kv8-fp8": ("#7fd8bd", DARK_INK, "KF"),
    "kv8-channel-int8": ("#6fbce8", DARK_INK, "KC"),
    "w3a16": ("#6a4fb3", LIGHT_INK, "3"),
    "w3a16-g128": ("#3f2a85", LIGHT_INK, "3"),
    "w3a16-g64": ("#6a4fb3", LIGHT_INK, "3"),
    "w3a16-g32": ("#a896dc", DARK_INK, "3"),
}
_SPARE = ("#7a5195", LIGHT_INK)


def look_of(scheme: str) -> Look:
    """How `scheme` is drawn; an unknown one gets a spare colour, hatched, with its weight's bits as the label."""
    plain = _plain(scheme)
    if plain in _FILLS:
        fill, ink, label = _FILLS[plain]
        mark = "+" if ROWS in scheme else "z" if scheme.endswith(ZERO_POINTS) else ""
        return Look(fill=fill, ink=ink, label=f"{label}{mark}", hatched=plain != scheme)
    bits = re.match(r"w(\d{1,2})", scheme)
    return Look(fill=_SPARE[0], ink=_SPARE[1], label=bits.group(1) if bits else "?", hatched=True)


def in_order(schemes: list[str]) -> list[str]:
    """`schemes` from the fewest bits to bf16, then unknown ones by name: the order of every legend."""
    ranks = {name: rank for rank, name in enumerate(reversed(_FILLS))}
    return sorted(schemes, key=lambda name: (ranks.get(_plain(name), len(ranks)), name))


def _plain(scheme: str) -> str:
    plain = scheme.partition(ROWS)[0].removesuffix("-static").removesuffix(ZERO_POINTS)
    return BLOCKS.sub("-int8", plain)
