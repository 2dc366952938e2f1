"""Small pieces of SVG and HTML, written by hand so that a report needs no script and no library.

Positions along an axis are percentages of the drawing, sizes of text and marks are pixels: a figure stretches with the
page while its text stays readable, on a phone, too. Labels outside the plot hang into the padding around it
(`overflow: visible`), so no figure has to know how wide it will be. Every value is escaped by `tag`.
"""

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "diamond": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "triangle": "M0 -5.2l5.2 9h-10.4z",
    "ring": "M-7 0a7 7 0 1 0 14 0a7 7 0 1 0 -14 0z",
}


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """One element; `class_` and `stroke_width` style names become `class` and `stroke-width`, None is left out.

    Children that are plain strings are escaped, `Markup` is kept.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    body = "".join(escape(child) for child in children)
    return Markup(f"{''.join(parts)}>{body}</{name}>")


def joined(items: Iterable[str]) -> Markup:
    """The items one after the other, plain strings escaped."""
    return Markup("").join(items)


def at(share: float) -> str:
    """A position in the drawing: 0.25 -> "25%"."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def mark(shape: str, x: float, y: float, title: str, **attributes: object) -> Markup:
    """A mark of `MARKS` centred at shares (x, y) of the drawing, with a tooltip."""
    path = tag("path", tag("title", title), d=MARKS[shape], **attributes)
    return tag("svg", path, x=at(x), y=at(y), overflow="visible")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line between two points given as shares of the drawing."""
    return tag("line", x1=at(x1), y1=at(y1), x2=at(x2), y2=at(y2), class_=class_)


def text(content: str, x: float, y: float, class_: str, **attributes: object) -> Markup:
    """Text at shares (x, y); `dx`, `dy` shift it by pixels."""
    return tag("text", content, x=at(x), y=at(y), class_=class_, **attributes)


def figure(body: Markup, label: str, height: int, pads: str) -> Markup:
    """A drawing of `height` pixels and full width; `label` says in words what it shows, `pads` is CSS padding."""
    drawing = tag("svg", body, class_="plot", width="100%", height=height, role="img", aria_label=label)
    return tag("div", drawing, class_="frame", style=f"padding:{pads}")


class Axis:
    """Maps values to shares 0..1 of the drawing, linearly or by logarithm, with round ticks."""

    def __init__(self, low: float, high: float, *, log: bool = False) -> None:
        if high <= low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.log = low, high, log

    def share(self, value: float) -> float:
        """Where `value` lies, clipped to the drawing."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the axis: about `wanted` of them, or as many as the decades give."""
        if self.log:
            return self._log_ticks(wanted)
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for multiples in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            values = [m * 10.0**d for d in decades for m in multiples]
            found = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(found) >= wanted - 1:
                break
        return found
