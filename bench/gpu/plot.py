"""`python -m bench.gpu.plot [gpu.json] [FOLDER]`: the results as a figure (`gpu.svg`, `gpu.png`) and tables (`gpu.md`).

Above, how many times as fast as PyTorch's bfloat16 matmul each kernel is, by rows of activations, ours as lines and
peers dashed; below, what a decoder saves against bfloat16: as claimed by the layers' own times, as measured whole, and
at the roofline. Needs matplotlib, no GPU.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = {
    "w4a16-g128": "#0b6e4f",
    "w8a16": "#3fa34d",
    "w8a8-fp8": "#1d4ed8",
    "w8a8-int8": "#7c3aed",
    "w8a8-fp8-block": "#38bdf8",
    "w4a8-fp8-g128": "#d97706",
    "w4a8-int8-g128": "#dc2626",
}
PEERS = {
    "torch scaled_mm row fast": "#1d4ed8",
    "torch int_mm+scales": "#7c3aed",
    "torch tinygemm w4a16-g128": "#0b6e4f",
    "gemlite w4a16-g128": "#6b7280",
    "bitsandbytes nf4-g64": "#111827",
}
PANELS = ("8192", "llama3-8b gate_up")
PHASES = ("decode, batch 1", "decode, batch 64")
SAVINGS = (("saving_claimed", "claimed: the times of the parts, summed", "#9ca3af"),
           ("saving_measured", "measured: the whole as one graph", "#1d4ed8"),
           ("saving_ceiling", "roofline (modelled)", "#cbd5e1"))  # fmt: skip


def rows_of(content: Row, stage: str) -> list[Row]:
    """The rows of a stage, none where it was not run."""
    found: list[Row] = content["stages"].get(stage, {}).get("rows", [])
    return found


def timed(content: Row, shape: str) -> list[Row]:
    """Comparisons of a shape; of a form that was compared twice, the one with all others."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows_of(content, "compare"):
        if row["shape"] == shape and row.get("over_bf16") is not None:
            found.setdefault((row["form"], row["m"]), row)
    return list(found.values())


def _lines(axes: Any, content: Row, shape: str) -> None:
    rows = timed(content, shape)
    for colours, style in ((OURS, "-"), (PEERS, "--")):
        for form, colour in colours.items():
            points = sorted((r["m"], r["over_bf16"]) for r in rows if r["form"] == form)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=form, marker="o", markersize=3)
    axes.axhline(1.0, color="#9ca3af", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ms = sorted({r["m"] for r in rows})
    axes.set_xticks(ms, [f"{m:,}" for m in ms])
    axes.set_xlabel("rows of activations (measured at the dots alone)")
    axes.set_ylabel("times as fast as bfloat16")
    sizes = next((f", w [{r['n']}, {r['k']}]" for r in rows), "")
    axes.set_title(f"{shape}{sizes}")
    axes.grid(alpha=0.2)


def _bars(axes: Any, content: Row, phase: str) -> None:
    rows = rows_of(content, "decoder")
    chosen = [r for r in rows if r["phase"] == phase and r["plan"] != "bf16"]
    height = 0.8 / len(SAVINGS)
    for number, (key, name, colour) in enumerate(SAVINGS):
        places = [i + (number - 1) * height for i in range(len(chosen))]
        axes.barh(places, [100 * r[key] for r in chosen], height, label=name, color=colour)
    axes.set_yticks(range(len(chosen)), [r["plan"].replace(", ", "\n") for r in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#9ca3af", linewidth=0.8)
    axes.set_xlabel("time saved against bfloat16, %")
    axes.set_title(f"whole decoder, {phase}")
    axes.grid(axis="x", alpha=0.2)


def figure(content: Row, folder: Path) -> list[Path]:
    """Draws `gpu.svg` and `gpu.png`."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "gpu"
    from matplotlib import pyplot

    drawing = pyplot.figure(figsize=(14, 10), layout="constrained")
    upper, lower = drawing.subfigures(2, 1)
    for part, draw, names in ((upper, _lines, PANELS), (lower, _bars, PHASES)):
        axes = part.subplots(1, len(names))
        for place, name in zip(axes, names, strict=True):
            draw(place, content, name)
        handles, labels = axes[0].get_legend_handles_labels()
        if labels:
            part.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    drawing.suptitle(f"{content['device']}, {_versions(content)}, {content['date'][:10]}", fontsize=10)
    paths = [folder / "gpu.svg", folder / "gpu.png"]
    for path in paths:
        drawing.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _versions(content: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _speed_table(content: Row, shape: str) -> str:
    rows = timed(content, shape)
    ms = sorted({r["m"] for r in rows})
    lines = []
    for form in dict.fromkeys(r["form"] for r in rows):
        cells = {r["m"]: f"{_us(r['p50_us'])} ({r['over_bf16']:.2f})" for r in rows if r["form"] == form}
        lines.append([form, *(cells.get(m, "") for m in ms)])
    return table(["form", *(f"M = {m}" for m in ms)], lines)


def _best_table(content: Row, shape: str) -> str:
    rates = {r["name"]: r["value"] for r in rows_of(content, "ceilings")}
    memory = max(rates.get("copy", 0.0), rates.get("read", 0.0))
    lines = []
    for r in timed(content, shape):
        compute = rates.get(r["rate"], 0.0)
        lines.append(
            [r["form"], str(r["m"]), *(f"{r[key]:.2f}" for key in ("p20_us", "p50_us", "p80_us")),
             f"{r['gb_per_s']:,.0f}", f"{r['gb_per_s'] / memory / 10:.0f} %" if memory else "",
             f"{r['tflop_per_s']:.0f}", f"{100 * r['tflop_per_s'] / compute:.0f} %" if compute else ""]
        )  # fmt: skip
    return table(["form", "M", "p20", "p50", "p80", "GB/s", "of memory", "TFLOP/s", "of peak"], lines)


def _decoder_table(content: Row) -> str:
    lines = [
        [r["phase"], r["plan"], f"{r['weight_bytes'] / 1e9:.2f}", _us(r["bf16_us"]), _us(r["claimed_us"]),
         _us(r["measured_us"]), _us(r["ceiling_us"]), f"{100 * r['saving_claimed']:.1f} %",
         f"{100 * r['saving_measured']:.1f} %", f"{100 * r['saving_ceiling']:.1f} %", f"{r['tokens_per_s']:,.0f}"]
        for r in rows_of(content, "decoder")
    ]  # fmt: skip
    header = ["phase", "plan", "GB", "bf16 us", "claimed us", "measured us", "roofline us"]
    header += ["saving claimed", "measured", "roofline", "tokens/s"]
    return table(header, lines)


def _moved_table(content: Row) -> str:
    """Casts and mixtures of experts: there is no bfloat16 matmul beside them."""
    lines = [
        [r["shape"], r["case"], r["form"], _us(r["p50_us"]), f"{r['gb_per_s']:,.0f}", f"{r['tflop_per_s']:.0f}"]
        for r in rows_of(content, "compare")
        if "p50_us" in r and r["over_bf16"] is None
    ]
    return table(["what", "case", "form", "p50 us", "GB/s", "TFLOP/s"], lines)


def markdown(content: Row) -> Iterator[str]:
    """The tables, one after the other."""
    yield f"{content['device']}, driver {content.get('driver', '')}, {_versions(content)}, {content['date']}"
    rates = rows_of(content, "ceilings")
    yield "## Ceilings\n\n" + table(["what", "measured"], [[r["name"], f"{r['value']:.3f} {r['unit']}"] for r in rates])
    shapes = dict.fromkeys(r["shape"] for r in rows_of(content, "compare") if r.get("over_bf16") is not None)
    for shape in shapes:
        yield f"## {shape}: p50 in microseconds (times as fast as bfloat16)\n\n{_speed_table(content, shape)}"
    for shape in list(shapes)[:1]:
        yield f"## {shape} in full\n\n{_best_table(content, shape)}"
    yield f"## Casts and experts\n\n{_moved_table(content)}"
    yield f"## Decoder\n\n{_decoder_table(content)}"


def main(arguments: Sequence[str]) -> None:
    """Reads the results, writes tables and figure beside them or to another folder."""
    source = Path(arguments[0] if arguments else "bench/results/gpu.json")
    folder = Path(arguments[1]) if len(arguments) > 1 else source.parent
    content = json.loads(source.read_text())
    (folder / "gpu.md").write_text("\n\n".join(markdown(content)) + "\n")
    for path in figure(content, folder):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
