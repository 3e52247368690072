"""Shared by all tests: one thread a process, no model hub, which tests are due, and research data beside the checkout."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import rooms
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--due", action="store_true",
                     help="without tests for the night, of those of launchers and of long ones only what tests/rooms.py says is due")


def pytest_report_header(config):
    if config.getoption("--due"):
        whole = [Path(test).stem for test in rooms.due()]
        return f"launchers: the core, and all of {', '.join(whole) or 'nothing'} (all: DFL_TEST_ALL=1)"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name not in ("pure", "graphs"):
            item.add_marker(pytest.mark.xdist_group(group(item)))
    first = {"cluster": 1, "clock": 2}  # the longest groups
    items.sort(key=lambda item: max((first.get(mark.args[0], 3) for mark in item.iter_markers("xdist_group")), default=0))
    if config.getoption("--due"):
        items[:], resting = rooms.split(items, rooms.due(), rooms.changed(rooms.ROOT))
        config.hook.pytest_deselected(items=resting)


def group(item) -> str:
    """With --dist loadgroup: Slurm's tests, which mostly wait, beside all others; those that wait on the clock one at a time; of the
    others a file on one worker, which shares what its tests share."""
    if item.path.stem == "test_slurm":
        return "cluster"
    return "clock" if item.get_closest_marker("clock") else item.path.stem


RESEARCH_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def research_data() -> Path:
    """TREC-6, SST-2 and small pre-trained models; they are not part of the project."""
    if not RESEARCH_DATA.is_dir():
        pytest.skip(f"research data is not at {RESEARCH_DATA}")
    return RESEARCH_DATA
