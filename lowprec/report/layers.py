"""The picture of a plan: blocks from left to right, one row per role, a cell per group, and the rest beside it.

Rows are taller where groups hold more parameters (by the square root, within limits), so that the eye weighs what the
sizes weigh. Under the cells stands the predicted KL of each block. A cell's tooltip names its group, scheme,
predicted KL and cost; the same numbers are in the report's table of groups.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from lowprec.report import numbers
from lowprec.report.palette import in_order, look_of
from lowprec.report.svg import at, joined, tag
from lowprec.results import GroupChoice, Report

ROW_HEIGHTS = (20, 46)
KL_HEIGHT = 44
GAP = 22
LABELLED_BLOCKS = 40
CELL_MIN_WIDTH = 7


def layer_grid(report: Report) -> Markup:
    """The grid of blocks x roles; empty when the model has no blocks."""
    inside = [g for g in report.groups if g.block is not None]
    if not inside:
        return Markup("")
    columns = sorted({g.block for g in inside if g.block is not None})
    tops, height = _rows(inside)
    body = [_cell(g, columns, tops, report.cost.unit) for g in inside]
    for role, (top, tall) in tops.items():
        body.append(tag("text", role, x="0", y=top + tall / 2, dx=-12, dy=4, text_anchor="end", class_="role"))
    body.append(_block_numbers(columns, height))
    body.append(_kl_bars(inside, columns, height + GAP))
    whole = height + GAP + KL_HEIGHT
    words = f"Scheme of each of {len(inside)} groups in {len(columns)} blocks; the table of groups names them all."
    # Colours of cells are of no use to a reader who cannot see them: the words point at the table.
    drawing = tag("svg", joined(body), class_="plot", width="100%", height=whole, role="img", aria_label=words)
    least = f"min-width:{len(columns) * CELL_MIN_WIDTH}px"
    # Role names hang into this padding; 7.3 pixels is the width of a letter of the 12-pixel monospaced face.
    pad = max(88, round(7.3 * max(map(len, tops))) + 16)
    inner = tag("div", drawing, style=least, class_="cells-inner")
    return tag("div", inner, class_="cells", style=f"padding-left:{pad}px")


def is_wide(report: Report) -> bool:
    """Whether the grid has so many blocks that it needs the whole width."""
    return len({g.block for g in report.groups if g.block is not None}) > LABELLED_BLOCKS


def outside(report: Report) -> list[GroupChoice]:
    """The groups that belong to no block, largest first."""
    return sorted((g for g in report.groups if g.block is None), key=lambda g: -g.parameters)


def swatch(scheme: str) -> Markup:
    """A small square in the scheme's colour with its label."""
    look = look_of(scheme)
    parts = [tag("rect", width=22, height=16, rx=2, fill=look.fill)]
    if look.hatched:
        parts.append(tag("rect", width=22, height=16, rx=2, fill="url(#hatch)"))
    parts.append(
        tag("text", look.label, x=11, y=12, text_anchor="middle", style=f"fill:{look.ink}", class_="cell-label always")
    )
    return tag("svg", *parts, width=22, height=16, class_="swatch", aria_hidden="true")


def legend_order(report: Report) -> list[str]:
    """The schemes in use, in the order of every legend."""
    return in_order([share.scheme for share in report.schemes])


def _rows(groups: Sequence[GroupChoice]) -> tuple[dict[str, tuple[float, float]], float]:
    largest: dict[str, int] = {}
    for group in groups:
        largest[group.role] = max(largest.get(group.role, 0), group.parameters)
    low, high = ROW_HEIGHTS
    most = max(largest.values()) or 1
    tops, top = {}, 0.0
    for role, parameters in largest.items():
        tall = max(low, round(high * math.sqrt(parameters / most)))
        tops[role] = (top, float(tall))
        top += tall
    return tops, top


def _cell(group: GroupChoice, columns: Sequence[int], tops: dict[str, tuple[float, float]], unit: str) -> Markup:
    look, wide = look_of(group.scheme), 1 / len(columns)
    index = columns.index(group.block or 0)
    top, tall = tops[group.role]
    kl = f"predicted KL {numbers.significant(group.predicted_kl_nats, 2)} nats"
    words = tag("title", f"{group.group}: {group.scheme}, {kl}, cost {numbers.cost(group.cost, unit)}")
    place = {"x": at(index * wide), "y": f"{top:g}", "width": at(wide), "height": f"{tall:g}"}
    parts = [tag("rect", words, fill=look.fill, class_="cell", **place)]
    if look.hatched:
        parts.append(tag("rect", fill="url(#hatch)", class_="cell", pointer_events="none", **place))
    if len(columns) <= LABELLED_BLOCKS:
        middle = {"x": at((index + 0.5) * wide), "y": f"{top + tall / 2 + 4:g}", "style": f"fill:{look.ink}"}
        parts.append(tag("text", look.label, class_="cell-label", **middle))
    return joined(parts)


def _block_numbers(columns: Sequence[int], y: float) -> Markup:
    step = max(1, math.ceil(len(columns) / 30)) * (5 if len(columns) > 12 else 1)
    shown = [(i, block) for i, block in enumerate(columns) if i % step == 0]
    wide = 1 / len(columns)
    ticks = [
        tag("text", str(block), x=at((i + 0.5) * wide), y=f"{y + 15:g}", text_anchor="middle", class_="tick")
        for i, block in shown
    ]
    return joined([*ticks, tag("text", "block", x="0", y=f"{y + 15:g}", dx=-12, text_anchor="end", class_="tick")])


def _kl_bars(groups: Sequence[GroupChoice], columns: Sequence[int], top: float) -> Markup:
    sums = dict.fromkeys(columns, 0.0)
    for group in groups:
        sums[group.block or 0] += max(group.predicted_kl_nats, 0.0)
    most = max(sums.values()) or 1.0
    wide = 1 / len(columns)
    bars = []
    for index, (block, kl) in enumerate(sums.items()):
        tall = max(KL_HEIGHT * kl / most, 2.5 if kl > 0 else 0.0)
        words = tag("title", f"block {block}: predicted KL {numbers.significant(kl)} nats")
        place = {
            "x": at(index * wide),
            "y": f"{top + KL_HEIGHT - tall:.1f}",
            "width": at(wide),
            "height": f"{tall:.1f}",
        }
        bars.append(tag("rect", words, class_="kl-bar", **place))
    name = {"x": "0", "dx": -12, "text_anchor": "end"}
    bars.append(tag("text", "predicted", y=f"{top + KL_HEIGHT - 16:g}", class_="tick", **name))
    bars.append(tag("text", "KL", y=f"{top + KL_HEIGHT - 3:g}", class_="tick", **name))
    return joined(bars)
