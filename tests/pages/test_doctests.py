"""Every example in a docstring runs, and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import rlscuda

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(rlscuda.__path__, "rlscuda.")
    if not name.endswith(("._C", ".__main__"))
]


def examples(name):
    module = importlib.import_module(name)
    found = doctest.DocTestFinder().find(module, extraglobs={"torch": torch})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    runner = doctest.DocTestRunner()
    for test in examples(name):
        runner.run(test)
    assert runner.summarize().failed == 0


def test_there_are_examples():
    ran = [e for name in MODULES for test in examples(name) for e in test.examples]
    assert sum(doctest.SKIP not in example.options for example in ran) > 40
