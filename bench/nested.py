"""Nested weights on a model: plane 1 kept bit for bit, what both levels lose, their size, and their speed here.

    python bench/nested.py .demo/model.gguf [--artefact W4A16] [--tokens 66000] [--out .bench/nested]

Plane 1 is that of a finished INT4 artefact or, without one, uniform INT4 rounded as a run of effort `balanced` does. It
is given its second plane, written, and read back; all that follows is of what was read. Writes JSON with the machine
and versions; a bench that was cut goes on with the same command. Exit code 1 when a bar is missed:

    codes and scales of level 4 equal plane 1's, and so does its perplexity
    KL of level 8 at most 1.1 times that of standalone INT8 per channel (what a run takes: rounded to nearest), over
        64,000 tokens at least; INT8 rounded with error feedback stands beside it
    8.2 bits a weight at groups of 128, 8.35 at 64
    level 4 at least 1.4 times as fast as level 8, level 8 at most 5 % slower than plain INT8, where the weights are
        beyond the last-level cache (shapes of 2048 x 2048 and more)
    a switch of 200 groups in at most 10 us
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nested_quality import Loss, Quality, opened
from nested_speed import SpeedRow, rows
from rich.console import Console

from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.folder import RunFolder, canonical_json
from lowprec.artifacts.loading import read_back
from lowprec.artifacts.nested import read_nested, stored_bits_per_weight, with_residual
from lowprec.formats import SCHEMES, QuantizedWeight
from lowprec.formats.nested import RATIOS, NestedWeight, bits_per_weight
from lowprec.pipeline.summarise import environment
from lowprec.report import RunProgress
from lowprec.runtime.switch import Switch

KL_RATIO, FASTER, SLOWER, SWITCH_US, TOKENS = 1.1, 1.4, 1.05, 10.0, 64_000
BITS = {128: 8.2, 64: 8.35}
BEYOND_CACHE = 2048 * 2048
LEVEL_4, LEVEL_8, INT4, INT8, INT8_SOLVED = "level 4", "level 8", "int4", "int8 rtn", "int8 gptq"


def written(quality: Quality, solved: Mapping[str, QuantizedWeight], path: Path) -> dict[str, NestedWeight]:
    """Both planes, as they are read back from an artefact at `path`."""
    model = quality.prepared.context.model
    schemes = {
        layer: next(s for s in SCHEMES.values() if s.weight == weight.format and s.activation is None)
        for layer, weight in solved.items()
    }
    write_artefact(
        path, config=model.config, tensors=dict(model.module.state_dict()), solved=solved, schemes=schemes,
        finish=with_residual(quality.nested(solved)),
    )  # fmt: skip
    return read_nested(path)


def switch_us(groups: int = 200) -> float:
    """Microseconds of one switch."""
    switch = Switch([str(i) for i in range(groups)], [[4] * groups, [8] * groups])
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for rung in (0, 1) * 500:
            switch.set(rung)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def equal(solved: Mapping[str, QuantizedWeight], nested: Mapping[str, NestedWeight]) -> bool:
    """Whether plane 1 is bit for bit what was given."""
    return all(
        torch.equal(w.base.codes, solved[name].codes) and torch.equal(w.base.scale, solved[name].scale)
        for name, w in nested.items()
    )


def sizes(nested: Mapping[str, NestedWeight]) -> dict[str, float]:
    """Format of plane 1 -> bits of a weight, the largest of its layers'."""
    found: dict[str, float] = {}
    for weight in nested.values():
        name, k = weight.base.format, weight.residual.shape[1]
        found[name] = max(found.get(name, 0.0), bits_per_weight(name, k))
    return found


def missed(
    same: bool, losses: Mapping[str, Loss], bits: Mapping[str, float], speed: list[SpeedRow], microseconds: float
) -> list[str]:
    """The bars that are missed, in words."""
    found = [] if same else ["plane 1 is not what was given"]
    if losses[LEVEL_4].perplexity != losses[INT4].perplexity:
        found.append(f"perplexity {losses[LEVEL_4].perplexity} at level 4, {losses[INT4].perplexity} of INT4")
    ratio = losses[LEVEL_8].kl_nats / losses[INT8].kl_nats
    if ratio > KL_RATIO:
        found.append(f"KL of level 8 is {ratio:.2f} times standalone INT8's")
    if losses[LEVEL_8].tokens < TOKENS:
        found.append(f"only {losses[LEVEL_8].tokens} tokens were measured")
    for name, size in bits.items():
        group = 128 if "-g128" in name else 64
        found += [f"{size:.3f} bits a weight of {name}"] if size > BITS[group] else []
    for row in speed:
        if row.n * row.k < BEYOND_CACHE:
            continue
        shape = f"{row.n} x {row.k} g{row.group}"
        if row.level8_over_level4 < FASTER:
            found.append(f"level 4 is {row.level8_over_level4:.2f} times as fast as level 8 at {shape}")
        if row.level8_over_w8a16 > SLOWER:
            found.append(f"level 8 takes {row.level8_over_w8a16:.2f} times as long as plain INT8 at {shape}")
    return [*found, f"a switch takes {microseconds:.1f} us"] if microseconds > SWITCH_US else found


def main(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file or name.")],
    artefact: Annotated[Path | None, typer.Option(help="A finished W4A16 artefact of it: plane 1.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out text that losses are measured on.")] = 66_000,
    calibration_tokens: Annotated[int, typer.Option(help="Text that Hessians are summed over.")] = 16_384,
    exact_tokens: Annotated[int, typer.Option(help="Of the text, for level 4 beside standalone INT4.")] = 4_096,
    solved_int8: Annotated[bool, typer.Option(help="Measure INT8 rounded with error feedback, too.")] = True,
    seconds: Annotated[float, typer.Option(help="Timing, for each candidate and shape.")] = 1.0,
    seed: int = 0,
    out: Annotated[Path, typer.Option()] = Path(".bench/nested"),
    results: Annotated[Path, typer.Option()] = Path("bench/results/nested.json"),
) -> None:
    """Measures and prints."""
    record: dict[str, Any] = {}
    with RunFolder(out) as folder, RunProgress() as progress:
        quality = opened(model, folder, progress, tokens, calibration_tokens, seed)
        record["environment"] = environment(quality.prepared.context)
        with progress.step("speed"):
            speed = rows(seconds)
        solved = quality.compensated("w4a16") if artefact is None else read_back(artefact)
        nested = written(quality, solved, folder.path / "model")
        same, bits = equal(solved, nested), sizes(nested)
        level = {n: {k: functools.partial(w.dequantize, n) for k, w in nested.items()} for n in (4, 8)}
        parts = max(1, exact_tokens // 4096)
        losses = quality.measure({LEVEL_4: level[4], INT4: {k: w.dequantize for k, w in solved.items()}}, parts)
        rounded = {INT8: quality.plain_int8(list(nested))}
        if solved_int8:
            rounded[INT8_SOLVED] = quality.solved_int8(list(nested), "gptq")
        losses |= quality.measure({LEVEL_8: level[8], **rounded})
        microseconds = switch_us()
        lower, upper = quality.ratio(LEVEL_8, INT8)
        bars = missed(same, losses, bits, speed, microseconds)
        record |= {
            "plane_1_is_bit_identical": same,
            "losses": {name: dataclasses.asdict(loss) for name, loss in losses.items()},
            "kl_of_level_8_over_int8": losses[LEVEL_8].kl_nats / losses[INT8].kl_nats,
            "kl_of_level_8_over_int8_97.5%": [lower, upper],
            "bits_per_weight": bits,
            "bits_per_weight_in_files": stored_bits_per_weight(folder.path / "model"),
            "ratios": {
                str(r): sum(int((w.ratio == r).sum()) for w in nested.values())
                / sum(w.ratio.numel() for w in nested.values())
                for r in RATIOS
            },
            "speed": [dataclasses.asdict(row) for row in speed],
            "switch_us": microseconds,
            "missed": bars,
        }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(canonical_json(record))
    shown = {k: v for k, v in record.items() if k not in ("environment", "speed")}
    Console(width=160).print(shown)
    for row in speed:
        Console(width=160).print(
            f"{row.n} x {row.k} g{row.group}: level 8 / level 4 {row.level8_over_level4:.2f}, / {row.fastest_w8a16} "
            f"{row.level8_over_w8a16:.2f}, / {row.fastest_w8a8} {row.level8_over_w8a8:.2f}"
        )
    Console().print(f"bars that are missed: {bars or 'none'}")
    sys.exit(1 if bars else 0)


if __name__ == "__main__":
    typer.run(main)
