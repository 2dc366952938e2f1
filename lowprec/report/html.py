"""report.html: one self-contained page, readable offline, in light, dark and on paper.

The page is `report.html.j2` with its style in `style.html.j2`; figures are inline SVG from `figures` and `layers`.
It has no script, loads nothing, and says each result twice: as a picture and as text. Headlines are sentences that
state what was found, so that reading only them reads the report.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lowprec.artifacts import card
from lowprec.report import figures, layers, numbers
from lowprec.report.palette import look_of
from lowprec.results import LadderResult, Report
from lowprec.version import __version__

VERDICT_WORDS = {"within": "Within budget", "over": "Over budget", "inconclusive": "Inconclusive"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One quantity before and after: `note` says where it comes from, `figure` draws it."""

    label: str
    change: str
    note: str
    figure: Markup


def report_html(report: Report) -> str:
    """The text of report.html.

    Raises:
        jinja2.UndefinedError: the template names a field that does not exist (a bug).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2")
    return page.render(
        r=report,
        n=numbers,
        figures=figures,
        layers=layers,
        look_of=look_of,
        kind=report.plan.budget.kind,
        verdict_words=VERDICT_WORDS[report.verdict],
        headline=headlines(report),
        changes=changes(report),
        snippet=load_snippet(report),
        loading=card.LOADING[report.artefact_form],
        ladder_snippet=ladder_snippet(report),
        struck_out=struck_out(report),
        version=__version__,
    )


def headlines(report: Report) -> dict[str, str]:
    """One sentence per section that says what was found."""
    loss, kind, found = report.loss, report.plan.budget.kind, report.sensitivity
    rises = "rises" if loss.relative > 0 else "changes"
    certain = numbers.budget_percent(loss.confidence)
    ratio = found.predicted_kl_nats / found.measured_kl_nats if found.measured_kl_nats > 0 else None
    off = "" if ratio is None else f", {numbers.percent(abs(ratio - 1), 0)} too {'high' if ratio >= 1 else 'low'}"
    parity = "is what was scored" if report.parity.holds else "is not what was scored"
    return {
        "loss": f"{loss.metric.capitalize()} {rises} by {_unsigned(numbers.loss(loss.relative, kind))}, "
        f"by at most {_unsigned(numbers.loss(loss.upper, kind))} with {certain} confidence",
        "cost": _cost_headline(report),
        "layers": f"{report.cost.effective_bits:.2f} bits per linear parameter, chosen for {len(report.groups)} groups",
        "prediction": f"The mix was predicted at {numbers.significant(found.predicted_kl_nats)} nats and measured at "
        f"{numbers.significant(found.measured_kl_nats)}{off}",
        "parity": f"What is loaded {parity}",
        "ladder": _ladder_headline(report.ladder),
    }


def _ladder_headline(ladder: LadderResult | None) -> str:
    if ladder is None:
        return ""
    low, top = ladder.rungs[0], ladder.rungs[-1]
    return (
        f"{len(ladder.rungs)} rungs in {ladder.bits_per_weight:.2f} bits a weight: the lowest takes "
        f"{numbers.percent(low.full_us / top.full_us, 0)} of the top's time"
    )


def _unsigned(value: str) -> str:
    return value.removeprefix("+")


def _cost_headline(report: Report) -> str:
    cost = report.cost
    if cost.reduction_measured is None:
        return (
            f"Cost falls by {numbers.percent(cost.reduction_predicted)} by prediction; it was not measured end to end"
        )
    verb = "falls" if cost.reduction_measured >= 0 else "grows"
    measured = numbers.percent(abs(cost.reduction_measured))
    return f"Cost {verb} by {measured} ({numbers.percent(cost.reduction_predicted)} predicted)"


def changes(report: Report) -> list[Change]:
    """What the cost section draws: the workload's cost, the weights, decode and prefill where they are known."""
    cost = report.cost
    shown = (numbers.cost(cost.before, cost.unit), numbers.cost(cost.after, cost.unit))
    drawn = figures.before_after("Cost of the workload", cost.before, cost.after, shown)
    saved, note = numbers.reduction(cost.before, cost.after), f"{cost.origin}, lower is better"
    found = [Change(label="Cost of the workload", change=saved, note=note, figure=drawn)]
    if cost.unit != "bytes":
        sizes = (numbers.byte_size(cost.weight_bytes_before), numbers.byte_size(cost.weight_bytes_after))
        note = "counted, embeddings and scales included"
        saved = numbers.reduction(cost.weight_bytes_before, cost.weight_bytes_after)
        drawn = figures.before_after("Weights", cost.weight_bytes_before, cost.weight_bytes_after, sizes)
        found.append(Change(label="Weights", change=saved, note=note, figure=drawn))
    for label, before, after in (
        ("Decode", cost.decode_tokens_per_s_before, cost.decode_tokens_per_s_after),
        ("Prefill", cost.prefill_tokens_per_s_before, cost.prefill_tokens_per_s_after),
    ):
        if before is not None and after is not None:
            speeds = (_speed(before), _speed(after))
            drawn, note = figures.before_after(label, before, after, speeds), f"{cost.origin}, higher is better"
            found.append(Change(label=label, change=numbers.faster(before, after), note=note, figure=drawn))
    return found


def _speed(rate: float) -> str:
    return f"{numbers.significant(rate)}{numbers.GAP}tokens/s"


def struck_out(report: Report) -> list[tuple[str, str, str]]:
    """(scheme, shapes, reason), the shapes that share a reason on one row."""
    merged: dict[tuple[str, str], list[str]] = {}
    for item in report.struck_out:
        merged.setdefault((item.scheme, item.reason), []).append(f"{item.n}{numbers.GAP}×{numbers.GAP}{item.k}")
    return [(scheme, ", ".join(shapes), reason) for (scheme, reason), shapes in merged.items()]


def ladder_snippet(report: Report) -> str:
    """Python that serves along the ladder; empty where there is none."""
    if report.ladder is None:
        return ""
    return card.serve_snippet(json.dumps(str(Path(report.ladder.path).parent), ensure_ascii=False))


def load_snippet(report: Report) -> str:
    """Python that loads the artefact."""
    decoder = any(g.role == "lm_head" for g in report.groups)
    return card.load_snippet(report.artefact_form, json.dumps(report.artefact, ensure_ascii=False), decoder)
