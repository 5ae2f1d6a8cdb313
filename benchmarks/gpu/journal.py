"""A pytest plugin that writes what happens when it happens, so that a kill loses only the rest.

Lines of JSON go to $CHECK_JOURNAL under the name in $CHECK_STEP: each failure, each case that a
benchmark has timed, and at the end how many tests passed, failed and were skipped. A run in which
none passed has failed: without a device all would be skipped.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from rlscuda.files.journal import append_record

RECORD = "record"  # the property in which a test leaves the case that it has timed
_counts: Counter[str] = Counter()


def _write(record: dict) -> None:
    append_record(Path(os.environ["CHECK_JOURNAL"]), {"step": os.environ["CHECK_STEP"], **record})


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.failed:
        why = report.longreprtext.strip().splitlines()
        said = [line for line in why if line.startswith("E ")] or why
        _write({"failed": report.nodeid, "when": report.when, "why": "\n".join(said[:8])})
    if report.when == "call":
        for key, value in report.user_properties:
            if key == RECORD:
                _write(value)


def pytest_sessionfinish(session, exitstatus):
    if session.config.option.collectonly:
        return
    _write({"counts": dict(_counts), "pytest": int(exitstatus)})
    if not _counts["passed"] and exitstatus == 0:
        session.exitstatus = 1
