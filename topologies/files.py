"""Graphs from outside: edge lists, GraphML, networkx. ``FILES`` lists them. Every defect of a file is one clear error."""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import numpy as np

from topologies.links import Links
from topologies.registry import Entry, refuse


def edge_list(num_peers: int, *, path: str, directed: bool = False) -> Links:
    """Edges from a text file: two ids a line, and a weight if wanted (for weights 'given' or 'sinkhorn'); # comments.

    ``directed``: a line ``i j`` means that i sends to j.
    """
    rows = [_edge(words, f"{path}, line {number}") for number, words in words_of("edge_list", path)]
    weighted = {weight is not None for _, _, weight in rows}
    if len(weighted) > 1:
        raise ValueError(f"{path}: some lines have a weight and some have none")
    return _links(num_peers, rows, directed, str(path))


def words_of(name: str, path) -> list[tuple[int, list[str]]]:
    """(line number, words) of the lines that say something; commas count as blanks."""
    file = Path(path)
    if not file.is_file():
        raise refuse(name, "path to be a file", f"path={str(path)!r}")
    lines = enumerate(file.read_text().splitlines(), 1)
    found = [(number, line.split("#")[0].replace(",", " ").split()) for number, line in lines]
    return [(number, words) for number, words in found if words]


def number(word: str, place: str, what: str, least: float = 0.0) -> float:
    """A finite number of at least ``least``."""
    try:
        value = float(word)
    except ValueError:
        raise ValueError(f"{place}: {what} must be a number, got {word!r}") from None
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{place}: {what} must be finite and at least {least:g}, got {word}")
    return value


def peer(word: str, place: str) -> int:
    if not word.isdecimal():
        raise ValueError(f"{place}: a peer id must be an integer of at least 0, got {word!r}")
    return int(word)


def _edge(words: list[str], place: str) -> tuple[int, int, float | None]:
    if len(words) not in (2, 3):
        raise ValueError(f"{place}: expected two peer ids and at most a weight, got {' '.join(words)!r}")
    return peer(words[0], place), peer(words[1], place), number(words[2], place, "weight") if len(words) == 3 else None


def _links(num_peers: int, rows: list[tuple], directed: bool, where: str) -> Links:
    """Links from (i, j, weight or None), after refusing self loops, repetitions and foreign ids."""
    seen = set()
    for i, j, _ in rows:
        edge = (i, j) if directed else (min(i, j), max(i, j))
        if i == j:
            raise ValueError(f"{where}: self loop {i} - {j}; a peer always keeps a share of itself, leave it out")
        if edge in seen:
            raise ValueError(f"{where}: the edge {i} - {j} is there twice")
        if max(i, j) >= num_peers:
            raise ValueError(f"{where}: peer {max(i, j)} is not one of 0..{num_peers - 1} (num_peers={num_peers})")
        seen.add(edge)
    ends = np.array([(i, j) for i, j, _ in rows], dtype=np.int64).reshape(-1, 2)
    affinity = np.array([w for _, _, w in rows], dtype=np.float64) if rows and rows[0][2] is not None else None
    return Links.from_arcs(num_peers, ends[:, 0], ends[:, 1], directed, affinity)


def graphml(num_peers: int, *, path: str) -> Links:
    """A GraphML file; nodes are numbered in the order of their names (as numbers if all are numbers)."""
    if not Path(path).is_file():
        raise refuse("graphml", "path to be a file", f"path={str(path)!r}")
    try:
        graph = nx.read_graphml(path)
    except Exception as error:  # the parser raises whatever the XML library does
        raise ValueError(f"{path}: not readable as GraphML: {error}") from None
    return from_networkx(num_peers, graph=graph, where=str(path))


def from_networkx(num_peers: int, *, graph: nx.Graph, where: str = "graph") -> Links:
    """Any networkx graph, directed or not; nodes are numbered in sorted order, an edge attribute ``weight`` is kept."""
    if not isinstance(graph, nx.Graph):
        raise refuse("networkx", "graph to be a networkx graph", type(graph).__name__)
    if graph.number_of_nodes() != num_peers:
        raise ValueError(f"{where}: {graph.number_of_nodes()} nodes, but num_peers={num_peers}")
    place = {node: i for i, node in enumerate(_in_order(list(graph)))}
    rows = [(place[u], place[v], _weight(u, v, data, where)) for u, v, data in graph.edges(data=True)]
    if len({weight is None for _, _, weight in rows}) > 1:
        raise ValueError(f"{where}: some edges have a weight and some have none")
    return _links(num_peers, rows, graph.is_directed(), where)


def _weight(u, v, data: dict, where: str) -> float | None:
    return number(str(data["weight"]), f"{where}, edge {u} - {v}", "weight") if "weight" in data else None


def _in_order(nodes: list) -> list:
    for kind in (float, None):
        try:
            return sorted(nodes, key=kind)
        except (TypeError, ValueError):
            continue
    return nodes


FILES: dict[str, Entry] = {
    "edge_list": Entry(edge_list, "edges of a text file, `i j` or `i j weight` a line (path, directed)"),
    "graphml": Entry(graphml, "a GraphML file (path)"),
    "networkx": Entry(from_networkx, "a networkx graph handed in (graph); from Python only"),
}
