"""The exception tree. Everything a user can cause is a LowprecError; any other exception is a bug.

LowprecError
├── ConfigError              an argument or setting that cannot be used: the value and the remedy
├── UnsupportedError         the model, scheme or target cannot be combined: `reasons`, one per obstacle
├── ModelError               weights, config or activations that are damaged: names the tensor or layer
├── DataError                text that cannot carry calibration or a verdict: how much is needed
├── ArtifactError            a file or folder that is missing, damaged, in use or not writable: `path`
└── BudgetError              no mix meets the budget: `report` has the closest one
"""

from pathlib import Path
from typing import Any


class LowprecError(Exception):
    """Base of all errors that a user can cause; the command line prints its message and exits with 2."""


class ConfigError(LowprecError, ValueError):
    """An argument or setting that cannot be used."""


class UnsupportedError(LowprecError):
    """A combination that this version cannot do, with one reason per obstacle."""

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__("\n  - ".join([message, *reasons]))
        self.reasons = reasons


class ModelError(LowprecError):
    """Damaged weights, config or activations."""


class DataError(LowprecError):
    """Text that is missing, unreadable or too small for what it must show."""


class ArtifactError(LowprecError):
    """A file or folder that is missing, damaged, in use or not writable."""

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)


class BudgetError(LowprecError):
    """No mix of schemes meets the budget; `report` describes the one that came closest."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
