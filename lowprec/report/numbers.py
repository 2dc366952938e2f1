"""How quantities are written for people: three significant digits, a unit, and a sign where it matters.

Files keep the full numbers; only the terminal and report.html use these. A no-break space separates number and unit,
so that a line never ends between them; `plain` turns it into a blank where text is read by programs.
"""

from lowprec.records import OF_RUNTIMES
from lowprec.results import CostResult, Report

MINUS = "\N{MINUS SIGN}"
GAP = "\N{NO-BREAK SPACE}"


def plain(text: str) -> str:
    """`text` with ordinary blanks."""
    return text.replace(GAP, " ")


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent between 1e-3 and 1e7."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:#.{digits}g}".rstrip(".").replace("-", MINUS)


def percent(share: float, digits: int = 1, *, sign: bool = False) -> str:
    """`share` as a percentage, 0.05 -> "5.0 %"; `sign` writes the plus, too."""
    text = f"{100 * share:{'+' if sign else ''}.{digits}f}{GAP}%"
    return text.replace("-", MINUS)


def budget_percent(share: float) -> str:
    """A budget as people give it: 0.05 -> "5 %", 0.005 -> "0.5 %"."""
    return f"{100 * share:g}{GAP}%"


def part(share: float) -> str:
    """A share of a whole, where a small one must not look like none: 2e-4 -> "< 0.1 %"."""
    return f"<{GAP}0.1{GAP}%" if 0 < share < 5e-4 else percent(share)


def loss(value: float, kind: str) -> str:
    """A loss with its sign: a percentage when `kind` is relative, else the plain difference."""
    if kind == "relative":
        return percent(value, 2, sign=True)
    return ("+" if value > 0 else "") + significant(value)


def budget(report: Report) -> str:
    """The report's budget, as a percentage or a plain difference."""
    relative = report.plan.budget.kind == "relative"
    return budget_percent(report.loss.budget) if relative else f"{report.loss.budget:g}"


def byte_size(count: float) -> str:
    """Bytes in powers of 1000: 269000000 -> "269 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{significant(size) if unit != 'B' else round(size)}{GAP}{unit}"
        size /= 1000
    return f"{significant(size)}{GAP}TB"


def count(value: float) -> str:
    """A count with a magnitude letter: 134515008 -> "135 M"."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    size = float(value)
    for unit in ("", "k", "M", "G"):
        if abs(size) < 999.5:
            return f"{significant(size)}{GAP}{unit}".rstrip()
        size /= 1000
    return f"{significant(size)}{GAP}T"


def duration(seconds: float) -> str:
    """Seconds as the two largest units: 3725 -> "1 h 2 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f}{GAP}s"
    if seconds < 59.5:
        return f"{seconds:.0f}{GAP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{GAP}min {whole % 60}{GAP}s"
    return f"{whole // 3600}{GAP}h {whole % 3600 // 60}{GAP}min"


def cost(value: float, unit: str) -> str:
    """A cost in the unit of `CostResult.unit`: microseconds and bytes get their prefix, others stay as they are."""
    if unit == "us":
        for scale, name in ((1e6, "s"), (1e3, "ms")):
            if abs(value) >= scale:
                return f"{significant(value / scale)}{GAP}{name}"
        return f"{significant(value)}{GAP}µs"
    if unit == "bytes":
        return byte_size(value)
    return f"{significant(value)} {unit}"


def reduction(before: float, after: float) -> str:
    """The relative change from `before` to `after`: 10 -> 4 is "−60.0 %"; "" when there is no `before`."""
    return percent(after / before - 1, sign=True) if before else ""


def faster(before: float, after: float) -> str:
    """How many times as fast `after` is: 48 and 122 tokens/s are "2.54×"; "" when there is no `before`."""
    return f"{significant(after / before)}×" if before else ""


def workload(result: CostResult) -> str:
    """The workload as one phrase."""
    load = result.workload
    return f"batch {load.batch}, {load.prompt_tokens} prompt + {load.output_tokens} output tokens"


def runtime(report: Report) -> str:
    """What ran the model, in words."""
    return report.target if report.artefact_form in OF_RUNTIMES else "our kernels"
