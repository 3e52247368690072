"""A few rounds of every method end in the numbers they ended in before: what a refactor may not change."""

import json

import pytest
from golden import FILE, machine, measure

REFRESH = "if that is meant, run `python tests/golden.py` and say why in the commit"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    return measure(tmp_path_factory.mktemp("golden"))


@pytest.mark.long
def test_every_method_ends_in_the_numbers_it_ended_in(measured):
    wanted = json.loads(FILE.read_text())["runs"]
    assert measured.keys() == wanted.keys(), REFRESH
    far = [name for name, run in measured.items() if run["norm"] != pytest.approx(wanted[name]["norm"], rel=1e-4)]
    assert far == [], REFRESH


@pytest.mark.long
def test_every_method_ends_in_the_bits_it_ended_in(measured):
    golden = json.loads(FILE.read_text())
    if golden["machine"] != machine():
        pytest.skip(f"the digests are those of {golden['machine']}, this is {machine()}")
    assert [name for name, run in measured.items() if run["digest"] != golden["runs"][name]["digest"]] == [], REFRESH
