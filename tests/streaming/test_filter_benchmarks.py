"""The benchmarks of long and of badly conditioned series see what breaks."""

import pytest

pytest.importorskip("padasip", reason="a peer, in the extra [test]")
filter_numerics = pytest.importorskip("benchmarks.streaming.filter_numerics")
filter_windup = pytest.importorskip("benchmarks.streaming.filter_windup")


@pytest.mark.filterwarnings("ignore:RLSFilter", "ignore:overflow")
@pytest.mark.parametrize("kind", filter_windup.KINDS)
def test_windup(kind):
    settings = kind, 0.9, 8, "float64", 9000
    assert not filter_windup.failed(filter_windup.run(*settings))
    assert filter_windup.failed(filter_windup.run(*settings, ridge=0.0))
    assert not filter_windup.inputs("dead", 100, 10, 8).any()


def test_padasip_breaks():
    assert 100 < filter_windup.first_nan("narrow-band", 0.9, 8, 1000) < 1000
    assert filter_windup.first_nan("white", 0.9, 8, 1000) is None


@pytest.mark.filterwarnings("ignore:RLSFilter")
def test_numerics():
    row = filter_numerics.medians("mean 1000")
    assert 0 < row["covariance"] < row["five lines of NumPy"] and row["covariance, repairs"] > 0
