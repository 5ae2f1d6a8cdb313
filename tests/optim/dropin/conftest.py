"""What is alive before the tests of a module is not searched: they would take ten times as long."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _little_to_look_through():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
