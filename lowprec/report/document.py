"""report.json: a `Report` as canonical JSON, and back.

The file holds the record field for field, except that three lists of pairs become objects, because a reader looks
them up by name: `schemes` (scheme -> groups, parameters), `sensitivity.spearman_within` (family or scheme ->
correlation) and `frontier[].scheme_shares` (scheme -> share). Keys are sorted, so the same report is the same bytes.

Left out: derived numbers such as `ParityResult.holds`, which follow from what is there.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from lowprec.errors import ConfigError
from lowprec.records import from_json
from lowprec.results import Report


def report_json(report: Report) -> str:
    """The text of report.json, with a final newline.

    Raises:
        ValueError: a number is NaN or infinite; the message names the field.
    """
    data = dataclasses.asdict(report)
    broken = sorted(f"{path} is {value}" for path, value in _numbers(data, "") if not math.isfinite(value))
    if broken:
        raise ValueError(f"report cannot be written: {', '.join(broken)}")
    data["schemes"] = {
        share.scheme: {"groups": share.groups, "parameters": share.parameters} for share in report.schemes
    }
    data["sensitivity"]["spearman_within"] = dict(report.sensitivity.spearman_within)
    for point, written in zip(report.frontier, data["frontier"], strict=True):
        written["scheme_shares"] = dict(point.scheme_shares)
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def report_from_json(text: str) -> Report:
    """The report of a report.json; schemes come back sorted by name, since JSON objects have no order.

    Raises:
        ConfigError: the text is no report.json of this schema version.
    """
    try:
        data = json.loads(text)
        data["schemes"] = [{"scheme": name, **share} for name, share in sorted(data["schemes"].items())]
        sensitivity = data["sensitivity"]
        sensitivity["spearman_within"] = sorted(sensitivity["spearman_within"].items())
        for point in data["frontier"]:
            point["scheme_shares"] = sorted(point["scheme_shares"].items())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is no report.json ({error!r}); run calibrate again to have it written") from error
    return from_json(Report, json.dumps(data))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path.removeprefix("."), value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}[{index}]")
