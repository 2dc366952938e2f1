"""SHA-256 of every file of an artefact, in digests.json, so that a copy can be checked.

    {"algorithm": "sha256", "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}}}

A digest shows that a copy is whole, not who made it: signatures are left out.
"""

import hashlib
import json
from pathlib import Path

from lowprec.artifacts.folder import canonical_json, write_text
from lowprec.errors import ArtifactError

FILE_NAME = "digests.json"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> dict[str, str]:
    """Digests every file below `folder` (hidden ones aside), writes digests.json and returns name -> SHA-256."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME and not path.name.startswith(".")
    }
    digests = {name: sha256_of(path) for name, path in found.items()}
    files = {name: {"bytes": found[name].stat().st_size, "sha256": value} for name, value in digests.items()}
    write_text(folder / FILE_NAME, canonical_json({"algorithm": "sha256", "files": files}))
    return digests


def verify_digests(folder: Path) -> tuple[str, ...]:
    """What is wrong with the files that digests.json lists; empty when nothing is.

    Raises:
        ArtifactError: digests.json is missing or unreadable.
    """
    path = folder / FILE_NAME
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"].items()
        expected = {name: (int(item["bytes"]), str(item["sha256"])) for name, item in listed}
    except FileNotFoundError as error:
        raise ArtifactError(path, "is missing; the artefact cannot be verified without it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(path, f"is not a digest file ({error}); copy the artefact again") from error
    problems = []
    for name, (size, value) in sorted(expected.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {file.stat().st_size} bytes, not {size}")
        elif sha256_of(file) != value:
            problems.append(f"{name}: content has changed")
    return tuple(problems)
