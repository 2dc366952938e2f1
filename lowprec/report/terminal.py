"""The summary that a run ends with, for a terminal of 80 columns or a pipe.

Everything is text first: colour only repeats what a word says, and where the stream cannot carry Unicode, arrows and
bars become ASCII. Paths are printed on lines of their own and never wrapped, so that they can be copied.
"""

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowprec.report import numbers
from lowprec.report.palette import look_of
from lowprec.results import REUSED, LadderResult, Report

VERDICT_STYLE = {"within": "bold green", "over": "bold red", "inconclusive": "bold yellow"}
VERDICT_WORDS = {"within": "WITHIN BUDGET", "over": "OVER BUDGET", "inconclusive": "INCONCLUSIVE"}
BAR_CELLS = 24
SLOWEST = 3


def print_summary(report: Report, console: Console, *, report_path: str = "") -> None:
    """Prints the summary of `report`; `report_path` is where its HTML lies."""
    plain = console.options.ascii_only
    console.print(summary(report, ascii_only=plain))
    for label, path in (("artefact", report.artefact), ("report", report_path)):
        if path:
            console.print(Text.assemble((f"{label:<12}", "dim"), _ascii(path, plain)), soft_wrap=True)


def summary(report: Report, *, ascii_only: bool = False) -> RenderableType:
    """The summary without the paths: the verdict with its reason, then one row per result."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for label, value in _rows(report):
        table.add_row(label, Text(_ascii(value, ascii_only)))
    return Group(Text(), _verdict(report, ascii_only), Text(), table, *_shares(report, ascii_only))


def _verdict(report: Report, ascii_only: bool) -> Text:
    words = Text(VERDICT_WORDS[report.verdict], style=VERDICT_STYLE[report.verdict])
    words.append(f"  {_ascii(report.verdict_reason, ascii_only)}", style="not bold default")
    if report.reused:
        words.append(f"\n{REUSED}", "yellow")
    return words


def _rows(report: Report) -> Iterable[tuple[str, str]]:
    turned = ", hidden states turned" if report.turned else ""
    yield "model", f"{report.model} for {report.target}, objective {report.objective}, effort {report.effort}{turned}"
    yield "loss", _loss(report)
    yield "cost", _cost(report)
    cost = report.cost
    yield "workload", f"{numbers.workload(cost)}; {cost.device} against {cost.baseline}"
    for label, before, after in (
        ("decode", cost.decode_tokens_per_s_before, cost.decode_tokens_per_s_after),
        ("prefill", cost.prefill_tokens_per_s_before, cost.prefill_tokens_per_s_after),
    ):
        if before is not None and after is not None:
            speeds = f"{numbers.significant(before)} → {numbers.significant(after)} tokens/s"
            yield label, f"{speeds} ({numbers.faster(before, after)})" if before else speeds
    saved = numbers.reduction(cost.weight_bytes_before, cost.weight_bytes_after)
    sizes = f"{numbers.byte_size(cost.weight_bytes_before)} → {numbers.byte_size(cost.weight_bytes_after)}"
    yield "weights", f"{sizes} ({saved}), {cost.effective_bits:.2f} bits per linear parameter"
    if cost.cache_bytes_before is not None and cost.cache_bytes_after is not None:
        saved = numbers.reduction(cost.cache_bytes_before, cost.cache_bytes_after)
        sizes = f"{numbers.byte_size(cost.cache_bytes_before)} → {numbers.byte_size(cost.cache_bytes_after)}"
        yield "KV cache", f"{sizes} ({saved}) of the whole workload"
    yield "parity", _parity(report)
    yield "prediction", _prediction(report)
    if report.ladder is not None:
        yield "ladder", _ladder(report.ladder)
    yield "time", _seconds(report)


def _loss(report: Report) -> str:
    loss, kind = report.loss, report.plan.budget.kind
    interval = f"[{numbers.loss(loss.lower, kind)}, {numbers.loss(loss.upper, kind)}]"
    text = f"{loss.metric} {numbers.loss(loss.relative, kind)} {interval}, budget {numbers.budget(report)}"
    text += f"; {numbers.budget_percent(loss.confidence)} one-sided, {loss.units} units, {loss.tokens:,} tokens"
    worst = max(loss.per_source, key=lambda s: s.relative, default=None)
    if worst is not None and len(loss.per_source) > 1:
        text += f"; worst source {worst.source} {numbers.loss(worst.relative, kind)}"
    return text


def _cost(report: Report) -> str:
    cost = report.cost
    text = f"{numbers.cost(cost.before, cost.unit)} → {numbers.cost(cost.after, cost.unit)} {cost.origin}; reduction "
    measured = (
        "not measured" if cost.reduction_measured is None else f"{numbers.percent(cost.reduction_measured)} measured"
    )
    return f"{text}{measured}, {numbers.percent(cost.reduction_predicted)} predicted"


def _parity(report: Report) -> str:
    parity = report.parity
    head = "holds" if parity.holds else "FAILS"
    codes = "equal" if parity.codes_equal else "DIFFERENT"
    kl, run, noise = (numbers.significant(x, 2) for x in (parity.kl_nats, parity.runtime_kl_nats, parity.noise_kl_nats))
    text = (
        f"{head}: codes {codes}, largest layer error {parity.max_layer_error:.2f} of tolerance, "
        f"KL {kl} nats as loaded, {run} in {numbers.runtime(report)} (bf16 noise {noise})"
    )
    if parity.token_match is not None:
        text += f"; {numbers.percent(parity.token_match)} of the tokens generated there are the scored model's"
    if parity.decode_kl_nats is not None and parity.scored_kl_nats is not None:
        decode, scored = (numbers.significant(x, 2) for x in (parity.decode_kl_nats, parity.scored_kl_nats))
        text += f"; decode there is {decode} nats from the unquantised model, the scored model {scored}"
    return text


def _prediction(report: Report) -> str:
    found = report.sensitivity
    return (
        f"KL of the mix {numbers.significant(found.predicted_kl_nats)} predicted, "
        f"{numbers.significant(found.measured_kl_nats)} measured; Spearman {found.spearman:.3f}"
    )


def _ladder(ladder: LadderResult) -> str:
    low, top = ladder.rungs[0], ladder.rungs[-1]
    losses, alone, full = (
        f"{shown(getattr(low, name))} → {shown(getattr(top, name))}"
        for name, shown in (("loss_nats", numbers.significant), ("alone_us", _pass), ("full_us", _pass))
    )
    return (
        f"{len(ladder.rungs)} rungs, {low.name} → {top.name}: KL {losses} nats; a pass of one sequence {alone}, "
        f"of {ladder.slots} {full}; {ladder.bits_per_weight:.2f} bits a weight hold them all"
    )


def _pass(us: float) -> str:
    return numbers.cost(us, "us")


def _seconds(report: Report) -> str:
    slowest = sorted(report.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    steps = ", ".join(f"{name} {numbers.duration(spent)}" for name, spent in slowest)
    total = numbers.duration(sum(report.seconds.values()))
    return f"{total} in all; slowest: {steps}; peak memory {numbers.byte_size(report.peak_memory_bytes)}"


def _shares(report: Report, ascii_only: bool) -> Iterable[RenderableType]:
    whole = sum(share.parameters for share in report.schemes)
    if not whole:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    for index, share in enumerate(sorted(report.schemes, key=lambda s: -s.parameters)):
        part = share.parameters / whole
        cells = round(part * BAR_CELLS)
        bar = Text(full * cells, style=look_of(share.scheme).fill).append(empty * (BAR_CELLS - cells), style="dim")
        groups = f"{share.groups} group{'s' if share.groups != 1 else ''}"
        table.add_row(
            "schemes" if not index else "", Text(share.scheme), bar, _ascii(numbers.percent(part), ascii_only), groups
        )
    yield table


def _ascii(text: str, ascii_only: bool) -> str:
    text = numbers.plain(text)
    if not ascii_only:
        return text
    for mark, plain in (("→", "->"), (numbers.MINUS, "-"), ("µ", "u"), ("×", "x")):
        text = text.replace(mark, plain)
    return text.encode("ascii", "backslashreplace").decode()
