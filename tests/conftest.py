"""Shared by all tests: one thread a process, no model hub, and the folder of research data beside the checkout."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))  # first, or the folder tests/topologies would pass for the package

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """With --dist loadgroup: Slurm's tests, which mostly wait, on one worker, and all others that start processes on another."""
    for item in items:
        if "pure" not in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("cluster" if item.path.stem == "test_slurm" else "machine"))


RESEARCH_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def research_data() -> Path:
    """TREC-6, SST-2 and small pre-trained models; they are not part of the project."""
    if not RESEARCH_DATA.is_dir():
        pytest.skip(f"research data is not at {RESEARCH_DATA}")
    return RESEARCH_DATA
