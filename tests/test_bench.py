"""Benchmarks are run by hand, so that they still import is all that keeps them from rotting unseen."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("file", sorted(BENCH.rglob("*.py")), ids=lambda file: file.stem)
def test_every_benchmark_imports(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a script its own folder is where it finds its neighbours.
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__
