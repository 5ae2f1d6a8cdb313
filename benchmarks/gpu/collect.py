"""Collects tests as a bare machine would: its input are lists of pytest's arguments, as JSON.

Modules of distributions that the machine lacks are refused, as if they were not installed. Its last
line is a list: for each call the exit status of pytest and the names of the chosen tests.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import json
import re
import sys

PACKAGES = ("torch", "numpy", "ninja", "pybind11", "setuptools", "pytest", "pytest-benchmark")
OWN = {"benchmarks", "rlscuda", "tests", "support"}


def needed(names: tuple[str, ...]) -> set[str]:
    """Distributions and all that they need, as far as it is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _normalised(waiting.pop())
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = [text for text in requirements if "extra ==" not in text]
        waiting += [re.match(r"[\w.-]+", text)[0] for text in plain]
    return found


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Bare(importlib.abc.MetaPathFinder):
    """Raises for modules of distributions that a bare machine lacks."""

    def __init__(self) -> None:
        allowed = needed(PACKAGES)
        owners = importlib.metadata.packages_distributions()
        lacking = {m for m, names in owners.items() if not {*map(_normalised, names)} & allowed}
        self.refused = lacking - OWN

    def find_spec(self, fullname, path=None, target=None):
        """Refuses; what it lets pass is found by others."""
        if fullname.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"a bare machine has no {fullname}", name=fullname)


class Names:
    """A plugin that keeps the names of the tests that are chosen."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session):
        """Keeps them."""
        self.names = [item.nodeid for item in session.items]


def main() -> None:
    """Makes every call."""
    sys.meta_path.insert(0, Bare())
    import pytest

    found = []
    for arguments in json.load(sys.stdin):
        names = Names()
        timing = [] if "no:benchmark" in arguments else ["-p", "pytest_benchmark.plugin"]
        status = pytest.main([*arguments, *timing, "--collect-only", "-qq"], plugins=[names])
        found.append([int(status), names.names])
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
