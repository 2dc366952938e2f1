"""Named things that are each one file in a folder: formats, solvers, targets.

Importing a registry's package loads every module of its folder, so a new member is a new file and nothing else.
A name registered twice is an error; an unknown name is answered with its neighbours.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from lowprec.errors import ConfigError

T = TypeVar("T")


def closest(name: str, known: Sequence[str]) -> str:
    """The sentence that an unknown `name` is answered with: a neighbour if there is one, and all that is known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(sorted(set(known)))}"


class Registry(Generic[T]):
    """A mapping from name to member, filled by the modules of `package` when it is first read.

    Args:
        kind: what a member is called in messages, for example "format".
        package: dotted name of the folder whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._members: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, member: T) -> T:
        """Adds `member`; a second registration of `name` is a bug and raises ValueError."""
        if name in self._members:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._members[name] = member
        return member

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")
            # Set last: an import that fails must fail again, not leave a half-filled registry behind.
            self._loaded = True

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._members:
            raise ConfigError(f"unknown {self.kind} {name!r}: {closest(name, list(self._members))}")
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._members))

    def __len__(self) -> int:
        self._load()
        return len(self._members)
