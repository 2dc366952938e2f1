"""What a finished run tells people: progress lines, a summary in the terminal, report.json and report.html.

Names are imported when they are first used: a simulation's page (`lowprec.report.simulation`) needs none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowprec.report.document import report_from_json, report_json
    from lowprec.report.html import report_html
    from lowprec.report.progress import RunProgress
    from lowprec.report.terminal import print_summary, summary

_HOME = {
    "RunProgress": "progress",
    "print_summary": "terminal",
    "report_from_json": "document",
    "report_html": "html",
    "report_json": "document",
    "summary": "terminal",
}

__all__ = ["RunProgress", "print_summary", "report_from_json", "report_html", "report_json", "summary"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowprec.report' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lowprec.report.{_HOME[name]}"), name)
