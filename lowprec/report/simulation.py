"""What a simulation found: a table in the terminal, its JSON, and a page that is readable offline, without a script."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowprec.errors import ArtifactError
from lowprec.records import from_json
from lowprec.report import numbers
from lowprec.report.svg import Axis, at, figure, joined, line, tag, text
from lowprec.simulate.compare import CONTROLLER, Comparison, Moment
from lowprec.version import __version__

LOOKS = ("one", "two", "three", "four", "five", "six")
PADS = "16px 16px 34px 5.2em"
HEIGHT = 150


def simulation_json(comparison: Comparison) -> str:
    """The text of a simulation's JSON, with a final newline."""
    return json.dumps(dataclasses.asdict(comparison), indent=2, sort_keys=True, allow_nan=False) + "\n"


def simulation_from_json(source: str) -> Comparison:
    """The comparison of such a text.

    Raises:
        ConfigError: it is none, or one of another version.
    """
    return from_json(Comparison, source)


def write_simulation(comparison: Comparison, folder: Path) -> Path:
    """Writes simulation.json and simulation.html into `folder`, which is made; returns the page's path.

    Raises:
        ArtifactError: they cannot be written there.
    """
    page = folder / "simulation.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "simulation.json").write_text(simulation_json(comparison), encoding="utf-8")
        page.write_text(simulation_html(comparison), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(folder, f"cannot be written ({error.strerror})") from error
    return page


def print_comparison(comparison: Comparison, console: Console, *, report_path: str) -> None:
    """The headline and a table."""
    c = comparison
    console.print(f"[bold]{escape(headline(c))}[/].", soft_wrap=True)
    table = Table(title=f"{c.requests:,} requests, {numbers.plain(numbers.duration(c.seconds))}; {c.origin} ladder")
    for name in ("policy", "TTFT p95", "TPOT p95", "late", "nats/token", "worst window", "switches"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for r in c.results:
        times = [numbers.plain(latency(v)) for v in (r.ttft_s.p95, r.tpot_s.p95)]
        losses = [numbers.significant(v) for v in (r.loss_nats, r.worst_window_nats)]
        late = numbers.plain(numbers.part(r.violation_share))
        table.add_row(r.policy, *times, late, *losses, str(r.switches))
    console.print(table)
    objectives = f"{numbers.plain(latency(c.ttft_s))} to the first token, {numbers.plain(latency(c.tpot_s))} per token"
    console.print(
        f"Objectives {objectives}; budget {numbers.significant(c.budget_nats)} nats per token over any "
        f"{c.window_tokens:,}. Report: {escape(report_path)}",
        soft_wrap=True,
    )


def simulation_html(comparison: Comparison) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("simulation.html.j2").render(
        c=comparison,
        n=numbers,
        time=latency,
        figures=figures(comparison),
        legend=_legend(comparison),
        headline=headline(comparison),
        version=__version__,
    )


def latency(seconds: float) -> str:
    """Seconds as people read latencies: 0.0183 -> "18.3 ms"."""
    whole = seconds >= 1.0
    return f"{numbers.significant(seconds if whole else 1e3 * seconds)}{numbers.GAP}{'s' if whole else 'ms'}"


def headline(comparison: Comparison) -> str:
    """What was found, in one sentence."""
    ours = comparison.result(CONTROLLER)
    fixed = next((r for r in comparison.results if r.policy == f"static {comparison.rungs[-1]}"), None)
    if fixed is None:
        return f"The controller misses an objective in {numbers.part(ours.violation_share)} of the requests"
    if not fixed.violations:
        did = "does not switch" if not ours.switches else f"switches {ours.switches} times"
        return f"The top rung alone misses no objective; the controller {did}"
    change = ours.violations / fixed.violations - 1
    fewer = f"{numbers.percent(abs(change))} {'more' if change > 0 else 'fewer'} requests miss an objective"
    better = f"{numbers.significant(fixed.ttft_s.p95 / ours.ttft_s.p95)}×"
    return f"{fewer} than at the top rung alone; the 95th percentile of the time to first token is {better} as good"


def figures(comparison: Comparison) -> list[tuple[str, Markup]]:
    """(title, figure) of arrivals, time to first token, queue and rung, on one axis of time."""
    rungs = comparison.rungs
    objective = latency(comparison.ttft_s)

    def rung_name(value: float) -> str:
        return rungs[int(value)] if value == int(value) and 0 <= value < len(rungs) else ""

    first = dataclasses.replace(comparison, series=comparison.series[:1])
    return [
        ("Requests a second", _lines(first, lambda m: m.arrivals_per_s, numbers.significant)),
        (
            f"Time to first token, 95th percentile of who arrived; the objective is {objective}",
            _lines(comparison, lambda m: m.ttft_s, latency, limit=comparison.ttft_s),
        ),
        ("Requests that wait", _lines(comparison, lambda m: m.waiting, numbers.significant)),
        ("Wanted rung", _lines(comparison, lambda m: m.rung, rung_name, highest=len(rungs) - 1.0)),
    ]


def _lines(
    comparison: Comparison,
    value: Callable[[Moment], float | None],
    shown: Callable[[float], str],
    *,
    limit: float | None = None,
    highest: float | None = None,
) -> Markup:
    """One line for each policy over the trace's time; stretches without a value are left out."""
    every = [v for s in comparison.series for m in s.moments if (v := value(m)) is not None]
    most = highest if highest is not None else max([*every, limit or 0.0, 1e-9])
    across, upwards = Axis(0.0, comparison.seconds or 1.0), Axis(0.0, 1.06 * most)
    body = []
    for start, end in comparison.bursts:
        left, right = across.share(start), across.share(end)
        body.append(tag("rect", x=at(left), y="0", width=at(right - left), height="100%", class_="beyond"))
    for tick in across.ticks():
        x = across.share(tick)
        body += [line(x, 0, x, 1, "grid"), text(numbers.duration(tick), x, 1, "tick", dy=18, text_anchor="middle")]
    ticks = upwards.ticks(4) if highest is None else [float(i) for i in range(int(highest) + 1)]
    for tick in ticks:
        y = 1 - upwards.share(tick)
        body += [line(0, y, 1, y, "grid"), text(shown(tick), 0, y, "tick", dx=-10, dy=4, text_anchor="end")]
    if limit is not None:
        body.append(line(0, 1 - upwards.share(limit), 1, 1 - upwards.share(limit), "limit"))
    paths = []
    # The controller comes last, so that it lies on top.
    for series, look in reversed(list(zip(comparison.series, itertools.cycle(LOOKS), strict=False))):
        parts, lifted = [], True
        for moment in series.moments:
            found = value(moment)
            if found is not None:
                x, y = across.share(moment.start_s), 1 - upwards.share(found)
                parts.append(f"{'M' if lifted else 'L'}{1000 * x:.1f} {1000 * y:.1f}")
            lifted = found is None
        shape = tag("path", tag("title", series.policy), d="".join(parts), class_=f"series {look}")
        paths.append(shape)
    drawing = tag("svg", *paths, width="100%", height="100%", viewBox="0 0 1000 1000", preserveAspectRatio="none")
    names = ", ".join(s.policy for s in comparison.series)
    return figure(joined([*body, drawing]), f"Over time, for {names}; the table has the figures.", HEIGHT, PADS)


def _legend(comparison: Comparison) -> Markup:
    items = []
    for series, look in zip(comparison.series, itertools.cycle(LOOKS), strict=False):
        sample = tag("path", d="M0 5H22", class_=f"series {look}")
        items.append(tag("li", tag("svg", sample, width=22, height=10, aria_hidden="true"), series.policy))
    return tag("ul", *items, class_="legend")
