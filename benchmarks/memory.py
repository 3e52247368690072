"""Resident memory of ten MiniLM peers in one process, beyond `import torch`. The base model must be there once.

    python benchmarks/memory.py
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

PEERS = (1, 10, 40)


def resident() -> tuple[float, float]:
    """(now, peak) in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))


def child(peers: int) -> None:
    """One run in a fresh process, so that the peak is its own; prints MB after `import torch`, at the end, and at the peak."""
    torch.set_num_threads(1)
    base, _ = resident()
    from dfl.config import load
    from dfl.run.train import train
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout = open(os.devnull, "w")
        fields = {"peers": peers, "model.dropout": 0, "data.max_length": 64, "data.max_valid": 100, "lora.targets": "[query, value]",
                  "train.rounds": 2, "train.local_steps": 3, "eval.every": 0, "threads": 1, "output": f"{folder}/run"}
        train(load(None, [f"--{key}={value}" for key, value in fields.items()]))
        sys.stdout = sys.__stdout__
    print(base, *resident(), flush=True)


def main() -> None:
    import subprocess

    from stamp import write
    rows = []
    for peers in PEERS:
        done = subprocess.run([sys.executable, __file__, str(peers)], capture_output=True, text=True, check=True)
        base, now, peak = map(float, done.stdout.split())
        rows.append({"peers": peers, "import_torch_mb": base, "end_beyond_torch_mb": round(now - base, 1),
                     "peak_beyond_torch_mb": round(peak - base, 1)})
        print(rows[-1], flush=True)
    write("memory", {"model": "MiniLM-L6, all 6 layers, float32", "rank": 8, "batch_size": 16, "max_length": 64}, rows)


if __name__ == "__main__":
    child(int(sys.argv[1])) if len(sys.argv) > 1 else main()
