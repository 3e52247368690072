"""How topologies scale: a peer's own row at n = 100,000, a whole W at n = 1,024, spectra at n = 10,000.

    python benchmarks/topology_figures.py [--output benchmarks/results/topologies.json]

Measures and asserts nothing; the targets stand next to the figures. Writes one stamped JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import networkx
import numpy as np
import scipy

import topologies
from topologies import spectrum

ROWS = [
    ("one_peer_exponential", 100_000, {}),
    ("hypercube_matching", 2**17, {}),
    ("alternating_ring", 100_000, {}),
    ("random_matching", 100_000, {}),
    ("ou_equidyn", 100_000, {}),
    ("base_graph", 100_000, {"k": 1}),
    ("base_graph", 100_000, {"k": 4}),
    ("torus", 100_000, {}),
    ("ring", 100_000, {}),
    ("exponential", 100_000, {}),
    ("grid_all_reduce", 100_000, {"group_size": 10}),
    ("hierarchical", 100_000, {"node_size": 8}),
    ("edge_activation", 100_000, {"p": 0.3, "base": "torus"}),
]
SPECTRA = [
    ("ring", {}, "metropolis"),
    ("torus", {}, "metropolis"),
    ("path", {}, "metropolis"),
    ("grid", {}, "metropolis"),
    ("grid", {}, "best_constant"),
    ("random_regular", {}, "metropolis"),
    ("barabasi_albert", {}, "metropolis"),
    ("random_geometric", {"radius": 0.03}, "metropolis"),
    ("tree", {}, "metropolis"),
    ("d_equistatic", {}, "metropolis"),
]


def row_figures(name: str, n: int, params: dict, calls: int = 300) -> dict:
    """Building, and rows of peers and rounds chosen at random; peak memory counts everything from the build on."""
    topologies.build(name, n, **params).neighbors(5, n // 3)  # whatever is imported or made once
    tracemalloc.start()
    topology = topologies.build(name, n, **params)
    topology.neighbors(5, n // 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    begin = time.perf_counter()
    topology = topologies.build(name, n, **params)
    built = time.perf_counter() - begin
    rng, times, degree = np.random.default_rng(0), [], 0
    for t, i in zip(rng.integers(10_000, size=calls).tolist(), rng.integers(n, size=calls).tolist(), strict=True):
        begin = time.perf_counter()
        degree = max(degree, len(topology.neighbors(t, i)))
        times.append(time.perf_counter() - begin)
    return {
        "name": name, "num_peers": n, "parameters": params, "build_ms": 1e3 * built,
        "row_us_median": 1e6 * statistics.median(times), "row_us_max": 1e6 * max(times),
        "row_entries_max": degree, "peak_memory_kb": peak / 1024,
    }  # fmt: skip


def matrix_figures(n: int, p: float, base: str, rounds: int = 20) -> dict:
    topology, times, cpu = topologies.build("edge_activation", n, p=p, base=base), [], []
    topology.matrix(0)
    for t in range(1, rounds + 1):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        topology.matrix(t)
        times.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
    figures = {"ms_median": 1e3 * statistics.median(times), "ms_max": 1e3 * max(times), "target_ms": 50}
    figures["cpu_ms_median"] = 1e3 * statistics.median(cpu)
    return {"name": "edge_activation", "num_peers": n, "p": p, "base": base, **figures}


def spectrum_figures(name: str, params: dict, weights: str, n: int = 10_000) -> dict:
    begin = time.perf_counter()
    topology = topologies.build(name, n, weights=weights, **params)
    built = time.perf_counter()
    value = spectrum.slem(topology)
    seconds = time.perf_counter() - built
    how = "closed form" if topology.eigenvalues(0) is not None else "Lanczos"
    figures = {"build_s": built - begin, "slem_s": seconds, "slem": value, "how": how}
    return {"name": name, "num_peers": n, "weights": weights, "parameters": params, **figures}


def stamp() -> dict:
    """What the figures depend on."""
    root = Path(__file__).resolve().parent.parent

    def git(*args):
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_modified": git("status", "--porcelain", "--", "topologies", "benchmarks/topology_figures.py").splitlines(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "networkx": networkx.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "topologies.json"))
    output = Path(parser.parse_args().output)
    result = {
        "stamp": stamp(),
        "rows": [row_figures(*case) for case in ROWS],
        "matrices": [matrix_figures(1024, p, base) for base in ("complete", "torus") for p in (0.02, 0.1, 0.5)],
        "spectra": [spectrum_figures(*case) for case in SPECTRA],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(f"row     {row['name']:22} n={row['num_peers']:7} {row['row_us_median']:9.1f} us  {row['peak_memory_kb']:8.1f} kB")
    for row in result["matrices"]:
        print(f"matrix  {row['name']:22} {row['base']:9} p={row['p']:<5} {row['ms_median']:6.1f} ms (target {row['target_ms']})")
    for row in result["spectra"]:
        print(f"slem    {row['name']:22} {row['weights']:14} {row['slem_s']:7.2f} s  {row['slem']:.9f}  {row['how']}")


if __name__ == "__main__":
    main()
