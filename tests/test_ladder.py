"""Ladders: JSON there and back, times between the measured ones, and what is refused."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from lowprec.errors import ArtifactError, ConfigError
from lowprec.ladder import Ladder, PassTime, Rung, read_ladder, write_ladder
from lowprec.records import from_json, to_json
from tests.ladders import GROUPS, ladder, pass_time


def changed(index: int, **fields: Any) -> Ladder:
    """The test's ladder with one rung changed."""
    whole = ladder()
    rungs = [dataclasses.replace(r, **fields) if i == index % 5 else r for i, r in enumerate(whole.rungs)]
    return dataclasses.replace(whole, rungs=tuple(rungs))


def measured(rung: Rung, **fields: Any) -> Rung:
    """The rung as if it had been measured, its times one percent wide."""

    def narrow(times: tuple[PassTime, ...]) -> tuple[PassTime, ...]:
        return tuple(
            dataclasses.replace(t, p20_us=0.995 * t.p50_us, p80_us=1.005 * t.p50_us, origin="measured") for t in times
        )

    times = {"prefill": narrow(rung.prefill), "decode": narrow(rung.decode)}
    return dataclasses.replace(rung, loss_origin="measured", **(times | fields))


def test_a_ladder_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    write_ladder(ladder(), path)
    assert read_ladder(path) == ladder()
    assert read_ladder(path, "0123456789abcdef") == ladder()
    assert from_json(Ladder, to_json(ladder())) == ladder()


def test_a_ladder_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    write_ladder(ladder(), path)
    with pytest.raises(ConfigError, match="digest 0123456789abcdef, this model's is fedcba"):
        read_ladder(path, "fedcba")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "is not JSON"),
        ('{"schema_version": 99}', "schema version 99, this version reads 1"),
        ("{}", "cannot be read"),
        (to_json(ladder()).replace('"int4"', '"int5"', 1), "int5"),
        (to_json(ladder()).replace('"p20_us": 16', '"p20_us": -16', 1), "times are positive"),
    ],
)
def test_a_file_that_holds_no_ladder_is_one_message_with_its_path(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as found:
        read_ladder(path)
    assert str(found.value).startswith(str(path))


def test_a_missing_file_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read as a ladder"):
        read_ladder(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_ladder(ladder(), tmp_path / "none" / "ladder.json")


def test_times_between_below_and_beyond_the_measured_ones() -> None:
    rung = dataclasses.replace(ladder().rungs[0], decode=(pass_time(2, 10.0), pass_time(4, 14.0)))
    assert [rung.pass_us("decode", n) for n in (0, 1, 2, 3, 4, 8)] == [0.0, 10.0, 10.0, 12.0, 14.0, 28.0]
    table = ladder().seconds("decode", 16)
    assert len(table) == 5
    assert table[4][16] == pytest.approx(20e-3)
    assert table[0][16] == pytest.approx(12e-3)
    assert all(low[n] < high[n] for low, high in itertools.pairwise(table) for n in range(1, 17))


@pytest.mark.parametrize(
    ("index", "fields", "words"),
    [
        (0, {"levels": tuple((g, "int3") for g in GROUPS)}, r"wants level 'int3' .*known: int4, int8"),
        (0, {"levels": (("head", "int4"),)}, "do not name the same groups"),
        (0, {"levels": ()}, "has no levels"),
        (0, {"loss_nats": -0.1, "loss_lower": -0.1}, "0 <= lower <= loss <= upper"),
        (0, {"loss_upper": 0.0}, "0 <= lower <= loss <= upper"),
        (0, {"loss_nats": float("nan")}, "0 <= lower <= loss <= upper"),
        (1, {"loss_nats": 0.2, "loss_upper": 0.3}, "loss rises from 0.1 to 0.2"),
        (0, {"prefill": (), "decode": ()}, "has prefill times at"),
        (0, {"decode": (pass_time(4, 1.0), pass_time(2, 1.0))}, "strictly rising"),
        (0, {"decode": ladder().rungs[4].decode}, "wins nothing"),
        (0, {"loss_origin": "guessed"}, "unknown origin 'guessed'"),
        (1, {"name": "r0"}, "a name of its own"),
    ],
)
def test_what_is_no_ladder(index: int, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(index, **fields)


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": 0, "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0},
        {"tokens": 1, "p20_us": 0.0, "p50_us": 1.0, "p80_us": 1.0},
        {"tokens": 1, "p20_us": 2.0, "p50_us": 1.0, "p80_us": 3.0},
        {"tokens": 1, "p20_us": 1.0, "p50_us": 1.0, "p80_us": float("inf")},
    ],
)
def test_what_is_no_time(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a pass over"):
        PassTime(**given, origin="measured")


def test_a_group_that_falls_on_the_way_up_needs_a_proof() -> None:
    crossed = tuple(zip(GROUPS, ("int8", "int4", "int4"), strict=True))
    with pytest.raises(ConfigError, match=r"from rung 'r0' to 'r1' blocks.0.qkv falls .*no measurement proves"):
        changed(0, levels=crossed)
    whole = ladder()
    below, above = (measured(r) for r in whole.rungs[:2])
    proved = (dataclasses.replace(below, levels=crossed), above, *whole.rungs[2:])
    assert dataclasses.replace(whole, rungs=proved).rungs[0].levels == crossed
    # As soon as the intervals of the losses meet, nothing is proved.
    doubted = (dataclasses.replace(below, levels=crossed, loss_lower=above.loss_upper), *proved[1:])
    with pytest.raises(ConfigError, match="no measurement proves"):
        dataclasses.replace(whole, rungs=doubted)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"confidence": 7.0}, "confidence 7 is outside"),
        ({"confidence": float("nan")}, "confidence nan is outside"),
        ({"context_tokens": -3}, "decoding at -3 tokens of context"),
        ({"loss_tokens": 0}, "losses from 0 tokens"),
    ],
)
def test_what_no_measurement_can_be_from(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(ladder(), **fields)


def test_rungs_are_found_by_name() -> None:
    assert ladder().rung_named("r3") == 3
    assert ladder().top == 4
    with pytest.raises(ConfigError, match="no rung 'r9': did you mean"):
        ladder().rung_named("r9")
