"""Public names, and what is refused before a run begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowprec
import tiny
from lowprec.api import optimize
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.errors import ArtifactError, UnsupportedError
from lowprec.pipeline.estimate import estimate
from lowprec.settings import Settings


def test_all_public_names_resolve_and_are_listed_where_they_live() -> None:
    assert sorted(lowprec.__all__) == sorted({*lowprec._HOME, "__version__"})
    for name in lowprec.__all__:
        assert getattr(lowprec, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lowprec, "optimise")


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.folder(tmp_path / "model")

    def unread(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", unread)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**8))
    with pytest.raises(UnsupportedError, match=r"GB of memory.* and 1 minute, but only 0\.1 GB"):
        optimize(tmp_path / "model", out=tmp_path / "out", effort=tiny.EFFORT)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ArtifactError, match="free some space"):
        optimize(tmp_path / "model", out=tmp_path / "out", effort=tiny.EFFORT)


def test_the_estimate_holds_what_the_artefact_will_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.decoder()
    # Saving a model sets it, so that whether it was there hung on the tests before.
    model.config.architectures = [type(model).__name__]
    expected = estimate(model, Settings(out=tmp_path, effort=tiny.EFFORT))
    asked: list[int] = []
    monkeypatch.setattr("lowprec.artifacts.compressed_tensors.require_space", lambda path, needed: asked.append(needed))
    write_artefact(tmp_path / "model", config=model.config, tensors=model.state_dict(), solved={}, schemes={})
    assert 0 < asked[0] <= expected.disk_bytes


def test_a_calibration_device_that_is_not_there_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"device 'cuda' cannot be used\n.*calibrate on 'cpu'"):
        optimize(tmp_path / "nowhere", out=tmp_path / "out", calibration_device="cuda")
    assert not (tmp_path / "out").exists()
