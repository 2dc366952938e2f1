"""Progress of a whole run: one line per step, with remaining time on a terminal, with seconds in a log.

Steps know nothing of this: they get a callable `(done, total) -> None`, which is `Step.report`. On a terminal each
step is a live bar with the time that remains; elsewhere (a pipe, a CI log) each step prints one line when it ends, so
that logs stay short. Both measure the seconds per step that the report shows; a step that runs more than once, as
the rounds of verification do, adds up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lowprec.report import numbers

NAME_WIDTH = 12


def duration(seconds: float) -> str:
    """Seconds for a line of text."""
    return numbers.plain(numbers.duration(seconds))


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0), justify="right")


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.finished or task.stop_time is not None or task.time_remaining is None:
            return Text("")
        return Text(f"{duration(task.time_remaining)} left", style="dim")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:.0f}"
        unit = task.fields["unit"]
        if not task.fields["counted"]:
            return Text("")
        return Text(f"{task.completed:.0f}{total} {unit}".rstrip(), style="dim")


class Step:
    """One running step; `advance` and `report` may be called from any thread."""

    def __init__(self, total: int | None, listener: Callable[[int, int | None], None]) -> None:
        self.done = 0
        self.total = total
        self._listener = listener

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self.done += n
        self._listener(self.done, self.total)

    def report(self, done: int, total: int) -> None:
        """`done` of `total` units are done; this is the callable that steps are given."""
        self.done, self.total = done, total
        self._listener(done, total)


class RunProgress:
    """Shows the steps of a run and measures them; use as a context manager.

    Args:
        console: where to print; standard error by default, so that standard output stays for the result.
        quiet: one line per finished step instead of live bars; None means quiet exactly when `console` is no terminal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = not self.console.is_terminal if quiet is None else quiet
        self._clock = clock
        self._seconds: dict[str, float] = {}
        # Seconds that steps within the steps now open took: each second belongs to one step.
        self._within: list[float] = []
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _Count(),
            _Elapsed(),
            _Remaining(),
            console=self.console,
            speed_estimate_period=120.0,
            disable=self.quiet,
        )

    def __enter__(self) -> "RunProgress":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step so far, in the order in which the steps began."""
        return dict(self._seconds)

    @contextmanager
    def step(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Step]:
        """Runs the body as step `name` of `total` units (None: unknown until reported).

        A body that raises is shown as failed, is measured all the same, and its exception passes through.
        """
        task = self._live.add_task(f"{name:<{NAME_WIDTH}}", total=total, unit=unit, counted=total is not None)
        step = Step(total, lambda done, of: self._live.update(task, completed=done, total=of, counted=True))
        self._seconds.setdefault(name, 0.0)
        start = self._clock()
        self._within.append(0.0)
        outcome = "failed after "
        try:
            yield step
            outcome = ""
        finally:
            spent = self._clock() - start
            self._seconds[name] += spent - self._within.pop()
            if self._within:
                self._within[-1] += spent
            self._finish(name, step, unit, f"{outcome}{duration(spent)}")
            self._live.update(task, total=step.total or max(step.done, 1), completed=_end(step, outcome))
            self._live.stop_task(task)

    def skip(self, name: str, reason: str) -> None:
        """Says that step `name` need not run, for example because its result is there from an earlier run."""
        self._seconds.setdefault(name, 0.0)
        self.note(f"{name:<{NAME_WIDTH}} skipped: {reason}")

    def note(self, text: str) -> None:
        """Prints one line above the bars."""
        self.console.print(Text(text), soft_wrap=True)

    def _finish(self, name: str, step: Step, unit: str, outcome: str) -> None:
        if self.quiet:
            total = "" if step.total is None else f"/{step.total}"
            counted = f" {step.done}{total} {unit}".rstrip() if step.done or total else ""
            self.note(f"{name:<{NAME_WIDTH}}{counted} {outcome}")


def _end(step: Step, outcome: str) -> int:
    # A step that never counted is drawn full when it ends well, as one that was cut stays where it was.
    return step.done if outcome else max(step.total or 1, step.done)
