"""The figures of a report: each function takes numbers and gives one accessible inline SVG.

loss_forest      interval of the loss, overall and per source, against the budget
before_after     two bars of one quantity
share_bar        parameters per scheme
ladder           time of a pass against loss, a point per rung
frontier         cheapest cost for each budget, the chosen mix marked
agreement        predicted against measured KL, both logarithmic, with the diagonal

The picture of the layers is in `layers`. Left out: scripts. Tooltips are SVG titles, and every number of a figure is
also in a table of the report.
"""

import itertools
from collections.abc import Callable, Sequence

from markupsafe import Markup

from lowprec.report import numbers
from lowprec.report.palette import in_order, look_of
from lowprec.report.svg import Axis, at, figure, joined, line, mark, tag, text
from lowprec.results import CheckedPair, LadderResult, Report

Shown = Callable[[float], str]
ROW = 34
SHAPES = {"4": "circle", "8": "square", "F8": "diamond"}


def loss_forest(report: Report) -> Markup:
    """Estimate and one-sided bounds for all data and for each source, with the budget as a line."""
    loss, kind = report.loss, report.plan.budget.kind
    rows = [("all data", loss.relative, loss.lower, loss.upper)]
    rows += [
        (s.source, s.relative, s.lower, s.upper) for s in loss.per_source if s.lower is not None and s.upper is not None
    ]
    values = [v for row in rows for v in row[1:]] + [0.0, loss.budget]
    spread = max(values) - min(values) or 1.0
    axis = Axis(min(values) - 0.04 * spread, max(values) + 0.14 * spread)
    height = ROW * len(rows) + 12
    limit = axis.share(loss.budget)
    body = [
        tag("rect", x=at(limit), y="0", width=at(1 - limit), height=at(1), class_="beyond"),
        *_vertical(axis, lambda v: _loss_tick(v, kind)),
        line(axis.share(0), 0, axis.share(0), 1, "zero"),
        line(limit, 0, limit, 1, "limit"),
        text(f"budget {numbers.budget(report)}", limit, 0, "limit-label", dy=-8, text_anchor="middle"),
    ]
    for index, row in enumerate(rows):
        body.append(_interval(axis, row, (ROW * index + ROW / 2 + 6) / height, kind, whole=index == 0))
    return figure(joined(body), _forest_words(report), height, "26px 12px 30px 8.5em")


def _interval(axis: Axis, row: tuple[str, float, float, float], y: float, kind: str, *, whole: bool) -> Markup:
    name, middle, low, high = row
    weight = "whole" if whole else "part"
    bounds = f"{numbers.loss(low, kind)} to {numbers.loss(high, kind)}"
    title = f"{name}: {numbers.loss(middle, kind)}, bounds {bounds}"
    left, right = axis.share(low), axis.share(high)
    bar = tag(
        "g",
        tag("title", title),
        line(left, y, right, y, f"interval {weight}"),
        *[tag("line", x1=at(x), x2=at(x), y1=at(y), y2=at(y), class_=f"cap {weight}") for x in (left, right)],
    )
    dot = mark("circle", axis.share(middle), y, title, class_=f"estimate {weight}")
    shown = name if len(name) <= 17 else f"{name[:16]}…"
    if whole:
        said = text(numbers.loss(middle, kind), right, y, "value-label", dx=10, dy=4)
        dot = joined([dot, said])
    return joined([bar, dot, text(shown, 0, y, f"row {weight}", dx=-12, dy=4, text_anchor="end")])


def _forest_words(report: Report) -> str:
    loss, kind = report.loss, report.plan.budget.kind
    return (
        f"Loss of {loss.metric}: {numbers.loss(loss.relative, kind)}, bounds {numbers.loss(loss.lower, kind)} to "
        f"{numbers.loss(loss.upper, kind)}, budget {numbers.budget(report)}; values per source are in the table."
    )


def before_after(label: str, before: float, after: float, shown: tuple[str, str]) -> Markup:
    """Two bars from zero; `shown` is how the two values are written."""
    most = max(before, after) or 1.0
    body = []
    for index, (name, value) in enumerate((("before", before), ("after", after))):
        y, width = 30 * index, 0.66 * value / most
        body.append(tag("rect", x="0", y=y, width=at(width), height=20, class_=f"bar {name}"))
        body.append(tag("text", name, x="0", y=y + 14, dx=-10, text_anchor="end", class_="tick"))
        body.append(tag("text", shown[index], x=at(width), y=y + 14.5, dx=8, class_=f"value {name}"))
    return figure(joined(body), f"{label}: {shown[0]} before, {shown[1]} after", 50, "0 0 0 3.8em")


def share_bar(shares: Sequence[tuple[str, float]], label: str, height: int = 22) -> Markup:
    """One bar divided among schemes; `shares` are (scheme, share) and add up to 1."""
    parts, left = [], 0.0
    given = dict(shares)
    for scheme in in_order(list(given)):
        look, share = look_of(scheme), given[scheme]
        if share <= 0:
            continue
        title = tag("title", f"{scheme}: {numbers.percent(share)}")
        place = {"x": at(left), "y": 0, "width": at(share), "height": "100%"}
        parts.append(tag("rect", title, fill=look.fill, class_="piece", **place))
        if look.hatched:
            parts.append(tag("rect", fill="url(#hatch)", class_="piece", pointer_events="none", **place))
        if share > 0.08 and height > 16:
            middle = {"style": f"fill:{look.ink}", "text_anchor": "middle", "dy": 4}
            parts.append(text(numbers.percent(share, 0), left + share / 2, 0.5, "piece-label", **middle))
        left += share
    return figure(joined(parts), label, height, "0")


def frontier(report: Report) -> Markup:
    """Predicted loss (logarithmic where it can be) against cost, a point per budget, the plan as a ring."""
    plan, points = report.plan, sorted(report.frontier, key=lambda p: p.budget)
    losses = [p.predicted_loss for p in points] + [plan.predicted_loss]
    costs = [p.cost for p in points] + [plan.predicted_cost]
    log = min(losses) > 0
    spread = max(costs) - min(costs) or abs(max(costs)) or 1.0
    across = Axis(min(losses) * 0.8, max(losses) * 1.35, log=True) if log else Axis(min(losses), max(losses))
    upwards = Axis(min(costs) - 0.2 * spread, max(costs) + 0.15 * spread)
    kind, unit = plan.budget.kind, report.cost.unit
    body = _horizontal(upwards, lambda v: numbers.cost(v, unit))
    body += _vertical(across, lambda v: numbers.budget_percent(round(v, 6)) if kind == "relative" else f"{v:g}")
    places = [(across.share(p.predicted_loss), 1 - upwards.share(p.cost)) for p in points]
    body += [line(*a, *b, "trend") for a, b in itertools.pairwise(places)]
    labelled: list[tuple[float, float]] = []
    for point, (x, y) in zip(points, places, strict=True):
        name = numbers.budget_percent(point.budget) if kind == "relative" else f"{point.budget:g}"
        title = f"budget {name}: cost {numbers.cost(point.cost, unit)}, {point.effective_bits:.2f} bits"
        body.append(mark("circle", x, y, title, class_="point"))
        # Budgets that buy (nearly) the same mix lie on top of each other: one label there can be read.
        if all(abs(x - a) > 0.05 or abs(y - b) > 0.06 for a, b in labelled):
            labelled.append((x, y))
            body.append(text(name, x, y, "point-label", dx=8, dy=-8))
    x, y = across.share(plan.predicted_loss), 1 - upwards.share(plan.predicted_cost)
    body.append(mark("ring", x, y, f"chosen: {numbers.cost(plan.predicted_cost, unit)}", class_="chosen"))
    body.append(text("chosen", x, y, "chosen-label", dx=-10, dy=18, text_anchor="end"))
    body.append(_axis_names("predicted loss on tuning data", "predicted cost"))
    words = f"Predicted cost against predicted loss for {len(points)} budgets; the table has the numbers."
    return figure(joined(body), words, 300, "30px 16px 50px 5.2em")


def ladder(found: LadderResult) -> Markup:
    """Loss with its bounds (logarithmic where it can be) against the time of a full decoding pass, a point per rung."""
    losses = [v for rung in found.rungs for v in (rung.loss_lower, rung.loss_upper)]
    times = [rung.full_us for rung in found.rungs]
    spread, log = max(times) - min(times) or max(times), min(losses) > 0
    across = Axis(min(losses) * 0.8, max(losses) * 1.35, log=True) if log else Axis(0.0, 1.1 * max(losses) or 1.0)
    upwards = Axis(min(times) - 0.2 * spread, max(times) + 0.15 * spread)
    body = _horizontal(upwards, lambda v: numbers.cost(v, "us")) + _vertical(across, lambda v: f"{v:g}")
    places = [(across.share(rung.loss_nats or across.low), 1 - upwards.share(rung.full_us)) for rung in found.rungs]
    body += [line(*a, *b, "trend") for a, b in itertools.pairwise(places)]
    for rung, (x, y) in zip(found.rungs, places, strict=True):
        said = f"{rung.name}: {numbers.significant(rung.loss_nats)} nats, {numbers.cost(rung.full_us, 'us')}"
        body.append(
            line(across.share(rung.loss_lower or across.low), y, across.share(rung.loss_upper), y, "interval part")
        )
        body.append(mark("circle", x, y, said, class_="point"))
    for rung, (x, y) in ((found.rungs[0], places[0]), (found.rungs[-1], places[-1])):
        body.append(text(rung.name, x, y, "point-label", dx=8, dy=-8))
    body.append(_axis_names("KL on tuning text, nats", f"decoding pass, {found.slots} sequences"))
    words = f"Time of a decoding pass against loss for {len(found.rungs)} rungs; the table has the numbers."
    return figure(joined(body), words, 300, "30px 16px 50px 5.2em")


def agreement(report: Report) -> Markup:
    """Predicted against measured KL of the checked pairs and of the whole mix; points at or below zero are left out."""
    found = report.sensitivity
    whole = ("the whole mix", found.predicted_kl_nats, found.measured_kl_nats)
    pairs = drawable(found.pairs)
    values = [v for p in pairs for v in (p.predicted_kl_nats, p.measured_kl_nats)]
    values += [v for v in whole[1:] if v > 0] or [1e-3]
    axis = Axis(min(values) * 0.6, max(values) * 1.7, log=True)
    body = [line(0, 1, 1, 0, "diagonal")]
    for low, high in ((1.0, 2.0), (2.0, 1.0)):
        start = axis.share(axis.low * low), 1 - axis.share(axis.low * high)
        end = axis.share(axis.high / high), 1 - axis.share(axis.high / low)
        body.append(line(*start, *end, "factor"))
    body += _horizontal(axis, _scientific) + _vertical(axis, _scientific)
    for pair in pairs:
        look = look_of(pair.scheme)
        numbers_said = f"predicted {pair.predicted_kl_nats:.2e}, measured {pair.measured_kl_nats:.2e} nats"
        place = axis.share(pair.predicted_kl_nats), 1 - axis.share(pair.measured_kl_nats)
        title = f"{pair.group} in {pair.scheme}: {numbers_said}"
        body.append(mark(SHAPES.get(look.label, "triangle"), *place, title, fill=look.fill, class_="pair"))
    if min(whole[1:]) > 0:
        place = axis.share(whole[1]), 1 - axis.share(whole[2])
        body.append(mark("ring", *place, f"whole mix: {whole[1]:.3g} against {whole[2]:.3g} nats", class_="chosen"))
        body.append(text("whole mix", *place, "chosen-label", dx=-12, dy=4, text_anchor="end"))
    body.append(_axis_names("predicted KL, nats", "measured KL, nats"))
    words = f"Predicted against measured KL of {len(pairs)} pairs; Spearman correlation {found.spearman:.3f}."
    return figure(joined(body), words, 300, "30px 16px 50px 5.2em")


def drawable(pairs: Sequence[CheckedPair]) -> list[CheckedPair]:
    """The pairs that a logarithmic figure can show."""
    return [p for p in pairs if p.predicted_kl_nats > 0 and p.measured_kl_nats > 0]


def mark_legend(pairs: Sequence[CheckedPair]) -> Markup:
    """Swatches for the marks of `agreement`, with the scheme's name."""
    items = []
    for scheme in in_order(sorted({p.scheme for p in drawable(pairs)})):
        look = look_of(scheme)
        shape = mark(SHAPES.get(look.label, "triangle"), 0.5, 0.5, scheme, fill=look.fill, class_="pair")
        items.append(tag("li", tag("svg", shape, width=14, height=14, aria_hidden="true"), scheme))
    return tag("ul", *items, class_="legend")


def _vertical(axis: Axis, shown: Shown) -> list[Markup]:
    drawn = []
    for value in axis.ticks():
        x = axis.share(value)
        drawn.append(line(x, 0, x, 1, "grid"))
        drawn.append(text(shown(value), x, 1, "tick", dy=18, text_anchor="middle"))
    return drawn


def _horizontal(axis: Axis, shown: Shown) -> list[Markup]:
    drawn = []
    for value in axis.ticks():
        y = 1 - axis.share(value)
        drawn.append(line(0, y, 1, y, "grid"))
        drawn.append(text(shown(value), 0, y, "tick", dx=-10, dy=4, text_anchor="end"))
    return drawn


def _axis_names(across: str, upwards: str) -> Markup:
    return joined(
        [
            text(f"{across} →", 1, 1, "axis-name", dy=40, text_anchor="end"),
            text(f"↑ {upwards}", 0, 0, "axis-name", dy=-14, dx="-5.2em"),
        ]
    )


def _loss_tick(value: float, kind: str) -> str:
    if abs(value) < 1e-12:
        return "no loss"
    return numbers.budget_percent(round(value, 6)) if kind == "relative" else f"{value:.3g}"


def _scientific(value: float) -> str:
    return numbers.significant(value, 1) if 1e-3 <= value < 1e3 else f"{value:.0e}".replace("e-0", "e−")
