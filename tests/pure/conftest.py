"""Pure tests do not wait for the disk, and the longest files come first."""

import os

import pytest

# a file goes to one worker as a whole: a long one that came last would keep one of them busy alone (launch/test.sh)
LONGEST = ("test_grid", "test_toy_oracle", "test_codecs", "test_golden", "test_adapters",
           "test_topologies_conformance", "test_checkpoint", "test_export", "test_rules_residual",
           "test_rules_aggregation", "test_executors", "test_tasks_docstrings", "test_topologies_tables",
           "test_tasks_models", "test_tasks_real", "test_rules_resume", "test_bad_input")


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: the others keep their order


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """os.fsync returns at once: none of these tests cuts the power, and a run of a second calls it twenty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
