"""The one command for a GPU, rehearsed on the CPU with small sizes: so that no minute of a GPU goes to a typing error."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import workplace

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]


def test_every_part_comes_to_its_end(tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--output", tmp_path / "gpu.json"], cwd=tmp_path,
                          env=workplace.ENVIRONMENT, capture_output=True, text=True, timeout=170)
    found = json.loads((tmp_path / "gpu.json").read_text())
    left_out = {} if find_spec("bitsandbytes") else {"four_bits": "bitsandbytes is not installed; pip install '.[quantized]'"}
    assert {name: part.get("why") for name, part in found["parts"].items() if part["outcome"] != "done"} == left_out, done.stdout
    assert done.returncode == 0 and found["finished"] and found["versions"] and found["git_commit"]
    # the checks come first, and each says something
    assert list(found["parts"])[:5] == ["versions", "linear_algebra", "rules", "codecs", "tiny_runs"] and len(found["parts"]) == 20
    assert all(part["found"] for name, part in found["parts"].items() if name not in left_out)
    assert found["parts"]["two_processes"]["found"]["2 processes gloo: as one process"]["good"]
