"""Measures the candidates of every family at the shapes of models, and writes the table of what won.

For a problem all candidates are measured shortly; the three fastest are measured again, interleaved, and what of them
is right (against float64, on the first and last rows of w) and fastest goes into the table. A candidate that raises or
gives wrong numbers is left out, one that a worker died on is not tried again. Where most candidates were left out
nothing is entered. The table is the one that ships, with the entries measured here put in; it is written after every
problem, by the one process that measures.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu import candidates, precompile
from bench.gpu.candidates import OPS, Case, Op, Tensors, config_label
from bench.gpu.check import distance
from bench.gpu.clock import Clock, Launch, copies_for
from bench.gpu.journal import Item, Notes, Row, described
from bench.gpu.precompile import Call
from bench.gpu.setting import Setting, Shape
from lowprec_kernels import tuning
from lowprec_kernels.tuning import Config, Entry, Family, Problem

FINALISTS = 3
SCREEN_MS = 3.0
FINAL_MS = 15.0
VERIFIED_ROWS = 256
# A candidate that takes so much longer than the best so far is not even captured in a graph.
HOPELESS = 6.0
FIRST_SHAPES = 5
FIRST_ROWS = 5
# Names a pattern of tasks ("w4a16.* 16x8192"): no others are tuned.
ONLY = "LOWPREC_TUNE_ONLY"


Configured = Callable[[int, Config], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A problem of one op; `op` "cast-..." for casts."""

    op: str
    case: Case

    @property
    def key(self) -> str:
        """Unique."""
        return f"{self.op} {self.case}"


def tasks(setting: Setting) -> list[Task]:
    """All problems, most wanted first: the first shapes in the first buckets, then other shapes, then other buckets."""
    wanted = re.compile(os.environ.get(ONLY, ""))
    return [task for task in _all_tasks(setting) if wanted.search(task.key)]


def _all_tasks(setting: Setting) -> list[Task]:
    main = [op for op in OPS if op.main and op.missing() is None]
    others = [op for op in OPS if not op.main and not op.experts and op.missing() is None]
    shapes, rows = setting.shapes, setting.tune_rows
    first, later = shapes[:FIRST_SHAPES], shapes[FIRST_SHAPES:]
    return [
        *_dense_tasks(main, first, rows[:FIRST_ROWS]),
        *_cast_tasks(setting),
        *_moe_tasks(setting),
        *_dense_tasks(others, first[:2], rows[:3]),
        *_dense_tasks(main, later, rows[:FIRST_ROWS]),
        *_dense_tasks(main, first, rows[FIRST_ROWS:]),
        *_dense_tasks(main, later, rows[FIRST_ROWS:]),
    ]


def _dense_tasks(ops: Sequence[Op], shapes: Sequence[Shape], rows: Sequence[int]) -> Iterator[Task]:
    for shape in shapes:
        for m in rows:
            case = Case(m=m, n=shape.n, k=shape.k)
            yield from (Task(op=op.name, case=case) for op in ops if op.fits(case))


def _cast_tasks(setting: Setting) -> Iterator[Task]:
    for m, k in setting.cast_shapes:
        yield Task(op="cast-fp8", case=Case(m=m, n=1, k=k))
    for m in (1, 64):
        yield Task(op="cast-fp8", case=Case(m=m, n=1, k=setting.decoder.hidden))


def _moe_tasks(setting: Setting) -> Iterator[Task]:
    moe = setting.moe
    rows = moe.tokens * moe.top_k
    for op in OPS:
        if op.experts and op.missing() is None:
            yield Task(op=op.name, case=Case(m=rows, n=2 * moe.intermediate, k=moe.hidden, experts=moe.experts))
            yield Task(op=op.name, case=Case(m=rows, n=moe.hidden, k=moe.intermediate, experts=moe.experts))


def family_and_problem(task: Task) -> tuple[Family, Problem]:
    """What the table knows a task by."""
    if task.op.startswith("cast-"):
        return candidates.cast_family(), Problem(m=task.case.m, n=1, k=task.case.k)
    op = candidates.BY_NAME[task.op]
    return op.family(), op.problem(task.case)


def calls(setting: Setting) -> Iterator[Call]:
    """What has to be compiled, in the order in which it is measured."""
    for task in tasks(setting):
        family, problem = family_and_problem(task)
        for config in family.fitting(_of_bucket(problem)):
            yield Call(op=task.op, case=task.case, dtype=setting.dtype, config=config)


def _of_bucket(problem: Problem) -> Problem:
    """The problem that `config_for` asks the candidates of: the end of its bucket."""
    return Problem(m=tuning.bucket(problem.m), n=problem.n, k=problem.k, experts=problem.experts)


def _at(run: Configured, config: Config, copy: int) -> object:
    return run(copy, config)


def _note(task: Task, config: Config) -> str:
    return f"{task.op} {config_label(config)}"


class Operands:
    """Copies of weights and an input for one task; weights of the last op and shape are kept."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._weights: dict[tuple[object, ...], list[Tensors]] = {}
        self._shape: tuple[int, int, int] | None = None

    def weights(self, op: Op, case: Case) -> list[Tensors]:
        """As many copies as make them cold; ops with equal operands share them."""
        shape = (case.n, case.k, case.experts)
        if shape != self._shape:
            self._weights.clear()
            self._shape = shape
        key = (op.weight, op.group)
        if key not in self._weights:
            stored = op.bytes_per_weight() * case.n * case.k * case.experts
            copies = copies_for(stored, self._setting.rotate_bytes)
            self._weights[key] = [candidates.make_weight(op, case, self._setting) for _ in range(copies)]
        return self._weights[key]


class Tuner:
    """Measures tasks and keeps the table."""

    def __init__(self, setting: Setting, table: Path) -> None:
        self.setting, self.table = setting, table
        self.clock = Clock(setting)
        self.operands = Operands(setting)
        self.entries: dict[str, dict[tuple[object, ...], Entry]] = {}
        for (family, _), rows in tuning.load_table(table).items():
            for entry in rows.values():
                self._put(family, entry)

    def _put(self, family: str, entry: Entry) -> None:
        p = entry.problem
        self.entries.setdefault(family, {})[tuning.bucket(p.m), p.n, p.k, p.experts] = entry

    def _launches(self, task: Task) -> tuple[int, Configured, tuple[Tensors, Tensors] | None]:
        """Copies, (configuration, copy) -> result, and the input and the weight that verifying needs."""
        setting, case = self.setting, task.case
        if task.op.startswith("cast-"):
            x_bytes = case.m * case.k * 2
            copies = copies_for(x_bytes, setting.rotate_bytes) if case.m > 64 else 1
            xs = [torch.randn(case.m, case.k, device=setting.device, dtype=setting.dtype) for _ in range(copies)]
            cast = candidates.fast_cast(task.op.removeprefix("cast-"))
            return copies, lambda copy, config: cast(xs[copy], config=config), None
        op = candidates.BY_NAME[task.op]
        weights, inputs = self.operands.weights(op, case), candidates.make_input(op, case, setting)

        def run(copy: int, config: Config) -> object:
            return candidates.launch(op, inputs, weights[copy], None, setting.dtype, config)

        return len(weights), run, (inputs, weights[0])

    def measure(self, task: Task, notes: Notes) -> list[Row]:
        """The winner's row; raises when nothing is right."""
        family, problem = family_and_problem(task)
        configs = family.fitting(_of_bucket(problem))
        copies, run, operands = self._launches(task)
        left_out: dict[str, str] = {}
        found: dict[Config, float] = {}
        for config in configs:
            reason = self._refused(task, config, notes.poisoned)
            if reason is not None:
                left_out[config_label(config)] = reason
                continue
            notes.note(_note(task, config))
            try:
                found[config] = self._screened(
                    functools.partial(_at, run, config), copies, min(found.values(), default=0.0)
                )
            except Exception as error:
                if self.setting.device == "cuda":
                    torch.cuda.synchronize()
                left_out[config_label(config)] = described(error)
        if len(found) < len(left_out):
            # The best of few would stand in the way of the best guess, and of a later run's choice.
            raise RuntimeError(f"only {len(found)} of {len(configs)} candidates ran: {left_out}")
        ranked = sorted(found, key=found.__getitem__)
        while ranked:
            best = ranked[:FINALISTS]
            timings = self.clock.interleaved(
                {str(c): (functools.partial(_at, run, c), copies) for c in best}, sample_ms=FINAL_MS
            )
            best.sort(key=lambda c: timings[str(c)].p50_us)
            for config in best:
                wrong = self._wrong(task, config, operands)
                if wrong is None:
                    return [self._won(task, family, problem, config, timings[str(config)].p50_us, found, left_out)]
                left_out[config_label(config)] = wrong
            ranked = ranked[FINALISTS:]
        raise RuntimeError(f"no candidate of {len(configs)} is right: {left_out}")

    def _refused(self, task: Task, config: Config, poisoned: set[str]) -> str | None:
        """Why a candidate is not tried."""
        if _note(task, config) in poisoned:
            return "crashed"
        call = Call(op=task.op, case=task.case, dtype=self.setting.dtype, config=config)
        return None if precompile.compiled(call) else "was not compiled in time"

    def _screened(self, launch: Launch, copies: int, best: float) -> float:
        us = self.clock.once_us(launch)
        if best and us > HOPELESS * max(best, 50.0):
            return us
        return self.clock.interleaved({"": (launch, copies)}, sample_ms=SCREEN_MS)[""].p50_us

    def _wrong(self, task: Task, config: Config, operands: tuple[Tensors, Tensors] | None) -> str | None:
        """Why a configuration's results are not right, on the first and the last rows of w; casts are not looked at.

        Without a bias: a variant with it would have to be compiled now.
        """
        if operands is None:
            return None
        op, case, (inputs, weight) = candidates.BY_NAME[task.op], task.case, operands
        y = candidates.launch(op, inputs, weight, None, self.setting.dtype, config)
        tail = max(0, case.n - VERIFIED_ROWS) // candidates.BLOCK * candidates.BLOCK
        for first, last in ((0, min(case.n, VERIFIED_ROWS)), (tail, case.n)):
            part = candidates.weight_rows(op, weight, first, last)
            error = distance(y[:, first:last], candidates.truth(op, inputs, part, None))
            if not error <= op.tolerance:
                return f"error {error:.2g} in rows {first} to {last}"
        return None

    def _won(
        self,
        task: Task,
        family: Family,
        problem: Problem,
        config: Config,
        us: float,
        found: dict[Config, float],
        left_out: dict[str, str],
    ) -> Row:
        self._put(family.name, Entry(problem=_of_bucket(problem), config=config, p50_us=us))
        if not self.setting.smoke:
            versions = {"torch": torch.__version__, "triton": _triton_version()}
            device = torch.cuda.get_device_name()
            tuning.save_table(
                self.table, device, versions, {name: list(rows.values()) for name, rows in self.entries.items()}
            )
        ranks = list(found)
        return {
            "op": task.op,
            "family": family.name,
            "case": str(task.case),
            "config": asdict(config),
            "p50_us": us,
            "guess": ranks.index(config),
            "guess_us": found[ranks[0]],
            "screened_us": {config_label(c): round(t, 2) for c, t in sorted(found.items(), key=lambda pair: pair[1])},
            "left_out": left_out,
        }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def table_here(setting: Setting) -> Path:
    """The table that this run reads and writes, see `tuning.VARIABLE`."""
    name = "smoke" if setting.smoke else torch.cuda.get_device_name()
    return Path(os.environ[tuning.VARIABLE]) / f"{tuning.device_slug(name)}.json"


def items(setting: Setting) -> list[Item]:
    """One for each problem."""
    tuner = Tuner(setting, table_here(setting))
    return [Item(key=task.key, run=lambda notes, task=task: tuner.measure(task, notes)) for task in tasks(setting)]
