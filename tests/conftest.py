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

RESEARCH_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def research_data() -> Path:
    """TREC-6, SST-2 and small pre-trained models; they are not part of the project."""
    if not RESEARCH_DATA.is_dir():
        pytest.skip(f"research data is not at {RESEARCH_DATA}")
    return RESEARCH_DATA
