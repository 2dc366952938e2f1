"""What a finished run tells people: progress lines, a summary in the terminal, report.json and report.html."""

from lowprec.report.document import report_from_json, report_json
from lowprec.report.html import report_html
from lowprec.report.progress import RunProgress
from lowprec.report.terminal import print_summary, summary

__all__ = ["RunProgress", "print_summary", "report_from_json", "report_html", "report_json", "summary"]
