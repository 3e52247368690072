"""Static graphs: from a name, a number of peers and parameters to links. ``GRAPHS`` lists them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from topologies.links import Links


def ring(num_peers: int) -> Links:
    """Each peer and its two neighbours; a single link for n = 2, none for n = 1."""
    ids = np.arange(num_peers)
    return Links.from_arcs(num_peers, ids, (ids + 1) % num_peers)


def complete(num_peers: int) -> Links:
    """Everybody with everybody."""
    i, j = np.triu_indices(num_peers, k=1)
    return Links.from_arcs(num_peers, i, j)


def star(num_peers: int) -> Links:
    """Peer 0 with everybody else: n peers in all."""
    leaves = np.arange(1, num_peers)
    return Links.from_arcs(num_peers, np.zeros_like(leaves), leaves)


def edge_list(num_peers: int, *, path: str) -> Links:
    """Undirected edges from a text file: two ids a line, ``#`` begins a comment."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"topology 'edge_list' needs a file, path={str(path)!r} is none")
    pairs = [_pair(line, number, path) for number, line in enumerate(file.read_text().splitlines(), 1)]
    edges = np.array([p for p in pairs if p is not None], dtype=np.int64).reshape(-1, 2)
    if edges.size and (edges.min() < 0 or edges.max() >= num_peers):
        raise ValueError(f"{path}: ids must be in 0..{num_peers - 1}, found {edges.min()}..{edges.max()}")
    return Links.from_arcs(num_peers, edges[:, 0], edges[:, 1])


def _pair(line: str, number: int, path) -> tuple[int, int] | None:
    words = line.split("#")[0].replace(",", " ").split()
    if not words:
        return None
    try:
        i, j = (int(word) for word in words[:2])
    except ValueError:
        raise ValueError(f"{path}, line {number}: expected two peer ids, got {line.strip()!r}") from None
    if i == j:
        raise ValueError(f"{path}, line {number}: self loop {i} {j}; a peer always keeps itself, leave it out")
    return i, j


GRAPHS = {
    "ring": (ring, "each peer with its two neighbours"),
    "complete": (complete, "everybody with everybody: exact averaging in one round"),
    "star": (star, "peer 0 with everybody else"),
    "edge_list": (edge_list, "undirected edges from a text file (path)"),
}
