"""The table of what trains over several processes, written from the tests that have passed.

pytest tests/distributed tests/frameworks --combinations docs/combinations.md
"""

from pathlib import Path

import pytest

HEAD = """# What trains over several processes

Written by `pytest tests/distributed --combinations docs/combinations.md` from the tests that
passed. *Exact* is one process with the joined minibatch, to rounding, and all ranks alike to the
bit; *refused* is an error or a reason in `coverage()`, with the model as it was. On CPUs, by gloo,
in float64; nothing of it has run by NCCL.

| combination | outcome | test |
|---|---|---|
"""


def pytest_configure(config):
    line = "combination(name, outcome): a row of the table of what trains over several processes"
    config.addinivalue_line("markers", line)


def pytest_addoption(parser):
    parser.addoption("--combinations", help="where to write the table of docs/combinations.md")


def rows_of(items):
    """(combination, outcome, test) of each marker, and the items that must pass for it."""
    rows = {}
    for item in items:
        name = f"{item.path.name}::{item.originalname}"
        for mark in item.iter_markers("combination"):
            rows.setdefault((*mark.args, name), []).append(item.nodeid)
    return rows


@pytest.fixture(scope="session")
def documented(request):
    """The rows of the table in docs/ and those that the collected tests stand for."""
    page = Path(__file__).resolve().parents[2] / "docs" / "combinations.md"
    if not page.is_file():
        pytest.skip("needs the source tree")
    lines = page.read_text().split("|---|---|---|\n")[1].splitlines()
    return {tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines}


class Writer:
    def __init__(self, path):
        self.path, self.passed, self.rows = Path(path), set(), {}

    def pytest_collection_finish(self, session):
        self.rows = rows_of(session.items)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self):
        rows = [row for row, ids in self.rows.items() if self.passed.issuperset(ids)]
        body = "".join(f"| {name} | {outcome} | `{test}` |\n" for name, outcome, test in rows)
        self.path.write_text(HEAD + body)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    path = session.config.getoption("--combinations")
    if path:
        session.config.pluginmanager.register(Writer(path))
