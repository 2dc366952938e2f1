"""The results as text: what failed, and the figures that matter, for the end of the output."""

from collections.abc import Iterable
from typing import Any

Stage = dict[str, Any]
MOST_LINES = 40
HEADLINE_ROWS = (1, 16, 64, 4096)


def summary(content: dict[str, Any], stages: Iterable[str]) -> str:
    """The stages of these names, briefly."""
    lines = [f"{content['device']}, {content['versions']}, {content['date']}"]
    writers = {
        "compile": _compile,
        "ceilings": _ceilings,
        "check": _check,
        "large": _check,
        "tune": _tune,
        "compare": _compare,
        "decoder": _decoder,
    }
    for name in stages:
        stage = content["stages"][name]
        lines.append(f"-- {name}: {stage['seconds']} s, {len(stage['left_out'])} left out")
        lines += writers[name](stage["rows"])[:MOST_LINES] if name in writers else []
        lines += _failures(stage["failed"])[:MOST_LINES]
        lines += [f"   CRASH {c['key']} {c['note'][:160]}: {c['error']}" for c in stage["crashes"][:10]]
    return "\n".join(lines) + "\n"


def _failures(failed: list[Stage]) -> list[str]:
    """A line for each error, with the first thing that it happened to."""
    keys: dict[str, list[str]] = {}
    for row in failed:
        keys.setdefault(row["error"], []).append(row["key"])
    return [
        f"   FAILED {here[0][:100]}{f' and {len(here) - 1} more' if here[1:] else ''}: {error[:200]}"
        for error, here in keys.items()
    ]


def _compile(rows: list[Stage]) -> list[str]:
    lines = []
    for r in rows:
        cost = f"{r['variants']} variants in {r['cpu_seconds']} s of processors, {r['left_out']} left out"
        lines += [f"   {cost}", *(f"   LAUNCHER {error}"[:200] for error in r["launchers"][:1])]
    return lines


def _ceilings(rows: list[Stage]) -> list[str]:
    return [f"   {r['name']:6} {r['value']:.3f} {r['unit']}" for r in rows]


def _check(rows: list[Stage]) -> list[str]:
    wrong = [r for r in rows if not r["ok"]]
    lines = [f"   {len(rows)} checks, {len(wrong)} wrong"]
    for op in sorted({r["op"] for r in rows}):
        errors = [r["error"] for r in rows if r["op"] == op and "error" in r and r["ok"]]
        lines.append(f"   {op}: largest error {max(errors, default=0.0):.2e}")
    return lines + [
        f"   WRONG {r['op']} {r['case']} {r['what']} {r.get('config', '')} {r.get('error', '')} {r.get('why', '')}"[
            :220
        ]
        for r in wrong
    ]


def _tune(rows: list[Stage]) -> list[str]:
    first = sum(r["guess"] == 0 for r in rows)
    lost = sorted(r["guess_us"] / r["p50_us"] for r in rows)
    lines = [f"   {len(rows)} problems, the first guess won {first}; it takes {lost[len(lost) // 2]:.2f} times the best"
             if rows else "   none"]  # fmt: skip
    dropped = {(r["op"], why) for r in rows for why in r["left_out"].items()}
    return lines + [f"   DROPPED {op} {config}: {why}"[:220] for op, (config, why) in sorted(dropped)]


def _compare(rows: list[Stage]) -> list[str]:
    lines = []
    timed = [r for r in rows if "p50_us" in r]
    for case in dict.fromkeys(r["case"] for r in timed):
        here = [r for r in timed if r["case"] == case]
        if here[0]["m"] not in HEADLINE_ROWS and here[0]["experts"] == 1:
            continue
        cells = [f"{r['form'].replace('torch ', 't.')} {r['p50_us']:.1f}" for r in here]
        lines.append(f"   {here[0]['shape']} {case}: {', '.join(cells)}")
    errors = {(r["form"], r["error"]) for r in rows if "error" in r}
    return lines + [f"   NO {form}: {error}"[:160] for form, error in sorted(errors)]


def _decoder(rows: list[Stage]) -> list[str]:
    lines = []
    for r in rows:
        times = f"bf16 {r['bf16_us']:.0f}, claimed {r['claimed_us']:.0f}, ceiling {r['ceiling_us']:.0f}"
        saving = f"saving {r['saving_measured']:.1%} measured, {r['saving_claimed']:.1%} claimed"
        lines.append(f"   {r['phase']}, {r['plan']}: {r['measured_us']:.0f} us ({times}); {saving}")
    return lines
