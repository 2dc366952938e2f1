"""Stages that survive what they run: a list of items, worked off by processes of its own that keep a journal.

    journal, one JSON object a line:   plan    [keys]           what there is to do
                                       begin   key              what is being done
                                       note    key, note        which part of it (a configuration)
                                       done    key, rows        its results
                                       fail    key, error       it raised; the process goes on
                                       crash   key, note, error the process died, hung, or lost its device

A kernel that faults takes the CUDA context of its process with it, and one that hangs never gives it back. So the
supervisor ends a worker that begins nothing new for `stall_seconds` and starts another one, which reads the journal and
skips what is finished; a note that a worker died on is not tried again, an item without notes has failed.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
MOST_CRASHES = 4
POLL_SECONDS = 0.2
# Importing PyTorch from a cold disk, many times at once.
STARTUP_SECONDS = 90.0
# Names a file with notes that workers of earlier stages died on, a JSON list.
VARIABLE = "LOWPREC_BENCH_POISONED"
BROKEN_CONTEXT = 3
LONGEST_ERROR = 400


class Journal:
    """One worker's lines, and what they say so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan: list[str] = []
        self.rows: dict[str, list[Row]] = {}
        self.failed: dict[str, str] = {}
        self.crashes: list[Row] = []
        self.current: tuple[str, str] | None = None
        self._read = 0
        self.refresh()

    def write(self, state: str, **fields: Any) -> None:
        """Appends a line, at once."""
        with self.path.open("a") as file:
            file.write(json.dumps({"state": state, **fields}) + "\n")

    def refresh(self) -> bool:
        """Reads the lines that are new; whether there were any."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))
        return bool(whole)

    def _take(self, line: Row) -> None:
        match line["state"]:
            case "plan":
                self.plan = line["keys"]
            case "begin":
                self.current = (line["key"], "")
            case "note":
                self.current = (line["key"], line["note"])
            case "done":
                self.rows[line["key"]], self.current = line["rows"], None
            case "fail":
                self.failed[line["key"]], self.current = line["error"], None
            case "crash":
                self.crashes.append(line)
                self.current = None
                tries = sum(c["key"] == line["key"] for c in self.crashes)
                if not line["note"] or tries >= MOST_CRASHES:
                    self.failed[line["key"]] = line["error"]

    @property
    def poisoned(self) -> set[str]:
        """Notes that a worker died on."""
        return {line["note"] for line in self.crashes if line["note"]}

    def left(self) -> list[str]:
        """What is planned and neither done nor failed."""
        return [key for key in self.plan if key not in self.rows and key not in self.failed]


@functools.cache
def _poisoned_before() -> set[str]:
    path = os.environ.get(VARIABLE)
    return set() if path is None else set(json.loads(Path(path).read_text()))


@dataclass(frozen=True, slots=True)
class Notes:
    """What an item tells the journal while it runs: `note` before a risky part; `poisoned` are parts to leave out."""

    journal: Journal
    key: str

    def note(self, text: str) -> None:
        """Says what is about to be tried."""
        self.journal.write("note", key=self.key, note=text)

    @property
    def poisoned(self) -> set[str]:
        """Notes that a worker before this one died on, in this stage or an earlier one."""
        return self.journal.poisoned | _poisoned_before()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to do, under a unique key; returns its rows of results."""

    key: str
    run: Callable[[Notes], list[Row]]


def described(error: BaseException) -> str:
    """One line about an error."""
    first = " ".join(str(error).split())
    return f"{type(error).__name__}: {first}"[:LONGEST_ERROR]


def _context_works() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def work(items: Sequence[Item], path: Path, deadline: float) -> None:
    """A worker: does what the journal at `path` lacks, until `deadline` (seconds since the epoch)."""
    journal = Journal(path)
    journal.write("plan", keys=[item.key for item in items])
    for item in items:
        if item.key in journal.rows or item.key in journal.failed:
            continue
        if time.time() >= deadline:
            return
        journal.write("begin", key=item.key)
        try:
            rows = item.run(Notes(journal, item.key))
        except Exception as error:
            if _context_works():
                journal.write("fail", key=item.key, error=described(error))
                continue
            journal.refresh()
            _, note = journal.current or ("", "")
            journal.write("crash", key=item.key, note=note, error=described(error))
            sys.stdout.flush()
            os._exit(BROKEN_CONTEXT)
        else:
            journal.write("done", key=item.key, rows=rows)


@dataclass(slots=True)
class _Worker:
    """A process that works on a shard, and when it last wrote."""

    command: list[str]
    journal: Journal
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    heard: float = 0.0

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        self.heard = time.time()

    def kill(self, error: str) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._record(error)

    def _record(self, error: str) -> None:
        self.journal.refresh()
        key, note = self.journal.current or ("", "")
        self.journal.write("crash", key=key, note=note, error=error)
        self.journal.refresh()

    def alive(self, stall_seconds: float, deadline: float) -> bool:
        """Looks after the process: starts it anew when it died or hung, as long as there is time."""
        assert self.process is not None
        if self.journal.refresh():
            self.heard = time.time()
        code = self.process.poll()
        if code == 0:
            return False
        if code is not None:
            # A worker that noticed itself that its context is broken has written why.
            if code != BROKEN_CONTEXT:
                self._record(f"the process ended with {code}")
        elif time.time() > self.heard + (stall_seconds if self.journal.plan else STARTUP_SECONDS):
            self.kill(f"nothing new for {time.time() - self.heard:.0f} s")
        elif time.time() > deadline + stall_seconds:
            self.kill("the stage's time was over")
            return False
        else:
            return True
        before_plan = sum(not line["key"] for line in self.journal.crashes) >= MOST_CRASHES
        if time.time() >= deadline or before_plan:
            return False
        self.start()
        return True


@dataclass(slots=True)
class Outcome:
    """What came of a stage."""

    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    crashes: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def gathered(journals: Iterable[Journal], seconds: float) -> Outcome:
    """All shards' journals together."""
    outcome = Outcome(seconds=round(seconds, 1))
    for journal in journals:
        outcome.rows += [row for rows in journal.rows.values() for row in rows]
        outcome.failed += [{"key": key, "error": error} for key, error in journal.failed.items()]
        outcome.crashes += [{k: v for k, v in line.items() if k != "state"} for line in journal.crashes]
        outcome.left_out += journal.left()
    return outcome


def supervise(
    command: Callable[[Path, int], list[str]],
    folder: Path,
    *,
    shards: int,
    seconds: float,
    stall_seconds: float,
    environment: dict[str, str],
    report: Callable[[Outcome], None],
    report_every: float = 3.0,
) -> Outcome:
    """Runs a stage in `shards` processes, for `seconds` at most.

    Args:
        command: journal, shard -> the command line of a worker.
        folder: for the journals.
        report: called with what there is so far, every `report_every` seconds and at the end.
    """
    start = time.time()
    deadline = start + seconds
    workers = []
    for shard in range(shards):
        path = folder / f"{shard}.jsonl"
        workers.append(_Worker(command(path, shard), Journal(path), environment))
        workers[-1].start()
    running, reported = list(workers), start
    journals = [worker.journal for worker in workers]
    try:
        while running:
            time.sleep(POLL_SECONDS)
            running = [worker for worker in running if worker.alive(stall_seconds, deadline)]
            if time.time() > reported + report_every:
                reported = time.time()
                report(gathered(journals, reported - start))
    finally:
        for worker in running:
            if worker.process is not None and worker.process.poll() is None:
                worker.kill("the run was stopped")
    outcome = gathered(journals, time.time() - start)
    report(outcome)
    return outcome
