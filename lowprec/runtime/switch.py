"""The rung that a model runs at: an integer that may change at any time, and that a pass sees once.

A *rung* is a level for each group of layers; rungs are few and made when the model is converted. Changing the rung
stores one integer: nothing is allocated, copied or compiled, and weights of all levels stay where they are. A forward
pass of the model notes the rung when it begins, for its own thread, and all its layers read that note: whatever other
threads store meanwhile, a pass runs at one rung from the first layer to the last. However it ends, Ctrl-C included, the
note ends with it. What is called without a pass (a layer by itself) sees the rung of the moment.

No torch here. Left out: passes that are spread over several threads, whose layers would see no note or another one.
"""

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from lowprec.errors import ConfigError
from lowprec.formats.nested import require_level
from lowprec.registry import closest


class _Pass(threading.local):
    """What a thread knows of its pass."""

    rung = -1
    vector: tuple[int, ...] | None = None
    pinned: int | None = None
    record: list[int] | None = None


class Switch:
    """The rung of the passes to come; safe under threads.

    Args:
        groups: names of the groups, in the order of the levels.
        rungs: the levels of the groups, one vector for each rung, the cheapest rung first.

    Raises:
        ConfigError: no rung, a vector of another length, or a level that does not exist.
    """

    __slots__ = ("_pass", "_rung", "groups", "rungs")

    def __init__(self, groups: Sequence[str], rungs: Sequence[Sequence[int]]) -> None:
        if not rungs:
            raise ConfigError("a switch needs a rung: give the levels of the groups")
        for number, levels in enumerate(rungs):
            if len(levels) != len(groups):
                raise ConfigError(f"rung {number} has {len(levels)} levels, there are {len(groups)} groups")
        self.groups = tuple(groups)
        self.rungs = tuple(tuple(require_level(level) for level in levels) for levels in rungs)
        self._rung = len(self.rungs) - 1
        self._pass = _Pass()

    @property
    def rung(self) -> int:
        """What the next pass will run at; the highest one at first."""
        return self._rung

    def set(self, rung: int) -> None:
        """Lets the passes that begin from now on run at `rung`; those that run stay as they are.

        Raises:
            ConfigError: there is no such rung.
        """
        self._rung = self._known(rung)

    def _known(self, rung: SupportsIndex) -> int:
        try:
            found = operator.index(rung)
        except TypeError:
            found = -1
        if not 0 <= found < len(self.rungs):
            raise ConfigError(f"rung {rung!r} does not exist: there are {len(self.rungs)}, 0 is the cheapest")
        return found

    @property
    def last_rung(self) -> int | None:
        """What this thread's present or last pass runs at; None before its first."""
        return None if self._pass.rung < 0 else self._pass.rung

    def level(self, place: int) -> int:
        """The level of the group at `place`, for the pass of this thread."""
        vector = self._pass.vector
        return self.rungs[self._rung][place] if vector is None else vector[place]

    @contextlib.contextmanager
    def pinned(self, rung: int) -> Iterator[None]:
        """Passes of this thread run at `rung` while open, whatever others set.

        Raises:
            ConfigError: there is no such rung.
        """
        before, self._pass.pinned = self._pass.pinned, self._known(rung)
        try:
            yield
        finally:
            self._pass.pinned = before

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[int]]:
        """The rungs of this thread's passes while open, in order: with one token a pass, those of the tokens."""
        found: list[int] = []
        before, self._pass.record = self._pass.record, found
        try:
            yield found
        finally:
            self._pass.record = before

    def in_pass(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` as a pass of this thread; a pass within one belongs to it."""
        now = self._pass
        if now.vector is not None:
            return forward(*args, **kwargs)
        # No counting and no hooks: those miss what is no `Exception`, and an interrupted pass would never end.
        try:
            now.rung = self._rung if now.pinned is None else now.pinned
            now.vector = self.rungs[now.rung]
            if now.record is not None:
                now.record.append(now.rung)
            return forward(*args, **kwargs)
        finally:
            now.vector = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies have the rungs, and passes of their own."""
        return _restored, (self.groups, self.rungs, self._rung)


def _restored(groups: Sequence[str], rungs: Sequence[Sequence[int]], rung: int) -> Switch:
    found = Switch(groups, rungs)
    found.set(rung)
    return found


def vectors(groups: Sequence[str], rungs: Sequence[int | Mapping[str, int]]) -> list[list[int]]:
    """Level vectors of rungs that are given as one level for all groups, or as group -> level.

    Raises:
        ConfigError: a rung that names unknown groups or leaves some out.
    """
    found = []
    for number, rung in enumerate(rungs):
        if isinstance(rung, int):
            found.append([rung] * len(groups))
            continue
        if unknown := [name for name in rung if name not in groups]:
            raise ConfigError(f"rung {number} names {unknown[0]!r}, which is no group: {closest(unknown[0], groups)}")
        if missing := [name for name in groups if name not in rung]:
            raise ConfigError(f"rung {number} has no level for {missing[0]!r}: give one for every group")
        found.append([rung[name] for name in groups])
    return found
