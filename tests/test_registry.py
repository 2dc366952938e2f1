"""The registry: loads a folder, collides loudly, answers unknown names with neighbours."""

import sys
from pathlib import Path

import pytest

from lowprec.errors import ConfigError
from lowprec.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from lowprec.registry import Registry, closest
from lowprec.solvers import SOLVERS


def test_reads_every_module_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugged"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from lowprec.registry import Registry\nTHINGS = Registry('thing', 'plugged')\n"
    )
    for name in ("two", "one"):
        (folder / f"{name}.py").write_text(f"from plugged import THINGS\nTHINGS.register('{name}', '{name}!')\n")
    monkeypatch.syspath_prepend(tmp_path)
    things: Registry[str] = __import__("plugged").THINGS
    assert list(things) == ["one", "two"]
    assert len(things) == 2
    assert things["two"] == "two!"
    assert "one" in things
    assert "three" not in things
    with pytest.raises(ConfigError, match=r"unknown thing 'twoo': did you mean 'two'\? known: one, two"):
        things["twoo"]
    for name in [name for name in sys.modules if name.split(".")[0] == "plugged"]:
        monkeypatch.delitem(sys.modules, name)


def test_import_errors_propagate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "broken_folder"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "bad.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        len(Registry[int]("thing", "broken_folder"))
    monkeypatch.delitem(sys.modules, "broken_folder")


def test_second_registration_is_an_error() -> None:
    things: Registry[int] = Registry("thing", "lowprec.formats")
    assert things.register("a", 1) == 1
    with pytest.raises(ValueError, match="thing 'a' is registered twice"):
        things.register("a", 1)
    assert things["a"] == 1


def test_without_a_neighbour_all_are_named() -> None:
    assert closest("zzz", ["b", "a"]) == "known: a, b"
    assert closest("zzz", ["b", "a", "b"]) == "known: a, b", "each once"


@pytest.mark.parametrize("registry", [WEIGHT_FORMATS, ACTIVATION_FORMATS, SOLVERS], ids=lambda r: r.kind)
def test_members_carry_their_own_name(registry: Registry[object]) -> None:
    assert len(registry) >= 2
    for name in registry:
        assert getattr(registry[name], "name", None) == name
