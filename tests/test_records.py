"""Records: JSON there and back, and what is refused."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import records, results
from lowprec.errors import ConfigError
from lowprec.records import Budget, PrecisionPlan, Scheme, Workload, digest, from_json, to_json
from lowprec.results import ParityResult, Report

RECORDS = [
    kind
    for module in (records, results)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.__name__
]
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a record's field, by its annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return instances(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(a) for a in arguments])
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=5),
        int: st.integers(),
        float: FINITE,
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple[hint]


def instances(kind: type) -> st.SearchStrategy[Any]:
    """Records of a kind, within what its own checks allow."""
    if kind is Budget:
        share, confidence = st.floats(1e-6, 1), st.floats(0.51, 0.99)
        names, kinds = st.text(max_size=5), st.sampled_from(["relative", "absolute"])
        return st.builds(Budget, metric=names, limit=share, confidence=confidence, kind=kinds)
    if kind is Workload:
        count = st.integers(1, 4096)
        return st.builds(Workload, batch=count, prompt_tokens=count, output_tokens=st.integers(0, 4096))
    fields = {name: values(hint) for name, hint in typing.get_type_hints(kind).items() if name != "schema_version"}
    return st.builds(kind, **fields)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda k: k.__name__)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_json_there_and_back(kind: type, data: st.DataObject) -> None:
    record = data.draw(instances(kind))
    text = to_json(record)
    back: Any = from_json(kind, text)
    assert back == record
    assert type(back) is kind
    assert to_json(back) == text
    assert text.endswith("\n")
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(record)))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda k: k.__name__)
def test_records_are_frozen_slotted_and_keyword_only(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(kind)
    assert all(field.kw_only for field in dataclasses.fields(kind))


def plan() -> PrecisionPlan:
    return PrecisionPlan(
        model="m",
        revision="r",
        groups=(("b.qkv", "w8a16"), ("a.qkv", "bf16")),
        budget=Budget(),
        workload=Workload(),
        target="torch",
        objective="time",
        solver="gptq",
        predicted_loss=0.01,
        predicted_cost=2,
        input_digests=(("cost.json", "00"),),
    )


def test_plan_keeps_its_order_and_types() -> None:
    back = from_json(PrecisionPlan, to_json(plan()))
    assert back.groups == plan().groups
    assert back.scheme_of() == {"b.qkv": "w8a16", "a.qkv": "bf16"}
    assert isinstance(back.predicted_cost, float)
    assert hash(back) == hash(plan())


def edited(**changes: Any) -> str:
    return json.dumps(json.loads(to_json(plan())) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(schema_version=2), "schema version 2, this version reads 1"),
        (edited(colour="red"), r"unknown fields \['colour'\]"),
        (edited(budget={"limit": 3.0}), "outside"),
        (edited(budget={"limits": 0.1}), "unknown fields"),
        (edited(predicted_loss=None), "cannot be read"),
        (edited(predicted_loss="much"), "cannot be read"),
        (edited(groups=[["a", "bf16", "extra"]]), "cannot be read"),
        (json.dumps({"model": "m"}), "cannot be read"),
        (to_json(plan())[:-20], "is not JSON"),
        ("[]", "schema version"),
        ("null", "schema version"),
        ("", "is not JSON"),
    ],
)
def test_damaged_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(PrecisionPlan, text)


def test_values_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(dataclasses.replace(plan(), predicted_loss=math.nan))


@pytest.mark.parametrize("limit", [0.0, -0.1, 3.0, math.nan])
def test_budget_bounds(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"outside \(0, 1\]"):
        Budget(limit=limit)
    with pytest.raises(ConfigError, match="confidence"):
        Budget(confidence=limit)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"prompt_tokens": 0}, {"output_tokens": -1}])
def test_workload_bounds(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        Workload(**bad)


def test_workload_rows() -> None:
    workload = Workload(batch=4, prompt_tokens=8)
    assert (workload.prefill_m, workload.decode_m) == (32, 4)


def test_digest_is_stable_and_separates_its_parts() -> None:
    assert digest("ab", b"c") == hashlib.sha256(b"2:ab1:c").hexdigest()[:16]
    assert digest("ab") == digest(b"ab")
    assert digest("ab", "c") != digest("a", "bc")
    assert len(digest()) == 16


@pytest.mark.parametrize(
    ("codes", "layer", "kl", "runtime", "holds"),
    [
        (True, 1.0, 2.0, 2.0, True),
        (False, 0, 0, 0, False),
        (True, 1.1, 0, 0, False),
        (True, 0, 2.1, 0, False),
        (True, 0, 0, 2.1, False),
    ],
)
def test_parity(codes: bool, layer: float, kl: float, runtime: float, holds: bool) -> None:
    found = ParityResult(
        codes_equal=codes, max_layer_error=layer, kl_nats=kl, noise_kl_nats=1.0, runtime_kl_nats=runtime,
        plain_kl_nats=9.0,
    )  # fmt: skip
    assert found.holds is holds


def test_the_report_is_among_the_records() -> None:
    assert {Report, Scheme, PrecisionPlan} <= set(RECORDS)
