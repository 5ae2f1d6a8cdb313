"""Losses of 0, dead units, inputs of any size: first steps of `benchmarks/steps/endurance.py`."""

import pytest

from benchmarks.steps.endurance import TASKS, failed, run


@pytest.mark.parametrize("form", ["spectral", "adaptive"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_keeps_its_footing(task, form):
    row = run(task, form, 1000)
    assert not failed(row), row


def test_what_fails_is_seen():
    row = run("memorised", "spectral", 2)
    assert not failed(row)
    assert all(failed(row | amiss) for amiss in ({"finite": False}, {"resets": 1}, {"refused": 1}))
