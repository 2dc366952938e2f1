"""Which text of a folder has been read, and what for: a verdict is only as good as its text is unread.

Windows, not sets, are noted, because another seed or effort deals the same text anew. A window counts as unread for a
purpose when nothing else has read it. A ledger that cannot be read says that everything has been.
"""

from lowprec.artifacts.folder import RunFolder
from lowprec.records import digest
from lowprec.steps.tokens import TokenSet

NAME = "looked"


class Ledger:
    """The ledger in a run's folder: digest of a window -> the purpose that first read it."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        stored = folder.read_step(NAME, None)
        self._damaged = stored is None and (folder.path / f"{NAME}.json").exists()
        self._read: dict[str, str] = stored or {}

    def note(self, data: TokenSet, purpose: str) -> None:
        """Says that `purpose` reads the windows of `data`."""
        if self._damaged:
            return
        fresh = {window: purpose for window in _windows(data) if window not in self._read}
        if fresh:
            self._read |= fresh
            self._folder.write_step(NAME, self._read, {})

    def unread(self, data: TokenSet, purpose: str) -> bool:
        """Whether no window of `data` was read for anything but `purpose`."""
        return not self._damaged and all(self._read.get(window, purpose) == purpose for window in _windows(data))


def _windows(data: TokenSet) -> list[str]:
    return [digest(ids.numpy().tobytes()) for ids in data.ids]
