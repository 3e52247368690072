"""Survivors under a schedule of kills, stops, cuts and returns, in the short forms of benchmarks/soak.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import soak

pytestmark = [pytest.mark.launch, pytest.mark.clock]


@pytest.mark.core
@pytest.mark.timeout(600)
def test_a_minute_of_losses_and_returns(tmp_path):
    found = soak.run(tmp_path, 1.0, 5.0, seed=1, late=90)
    assert found["events"] >= 3 and found["returns"] >= 1 and found["rounds_without_all"] >= 1, found


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", ["tcp", "zenoh"])
def test_ten_minutes(tmp_path, transport):
    if transport == "zenoh":
        pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
    found = soak.run(tmp_path, 10.0, 10.0, seed=2, late=90, transport=transport)
    assert found["events"] >= 20, found
