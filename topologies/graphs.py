"""Static graphs with a fixed construction: from a number of peers and parameters to links. ``GRAPHS`` lists them.

A builder returns ``Links``, or a ``Lattice`` when neighbours follow from the id alone.
"""

from __future__ import annotations

import math

import networkx as nx
import numpy as np

from topologies.links import Lattice, Links
from topologies.registry import Entry, refuse


def path(num_peers: int) -> Links:
    """0 - 1 - ... - (n-1)."""
    ids = np.arange(num_peers - 1)
    return Links.from_arcs(num_peers, ids, ids + 1)


def ring(num_peers: int) -> Lattice:
    """Each peer and its two neighbours; a single link for n = 2, none for n = 1."""
    return Lattice((num_peers,), [(1,), (-1,)])


def complete(num_peers: int) -> Lattice:
    """Everybody with everybody."""
    return Lattice((num_peers,), np.arange(num_peers)[:, None])


def star(num_peers: int) -> Links:
    """Peer 0 with everybody else: n peers in all."""
    leaves = np.arange(1, num_peers)
    return Links.from_arcs(num_peers, np.zeros_like(leaves), leaves)


def wheel(num_peers: int) -> Links:
    """Peer 0 with everybody else, and a ring through the others; n >= 4."""
    if num_peers < 4:
        raise refuse("wheel", "num_peers of at least 4", num_peers, "'star' and 'complete' have no lower limit")
    return Links.from_networkx(nx.wheel_graph(num_peers))


def complete_bipartite(num_peers: int, *, left: int | None = None) -> Links:
    """Peers 0..left-1 with all others; left = n // 2."""
    left = num_peers // 2 if left is None else left
    if not 0 < left < num_peers:
        raise refuse("complete_bipartite", "0 < left < num_peers", f"left={left}, num_peers={num_peers}")
    return Links.from_networkx(nx.complete_bipartite_graph(left, num_peers - left))


def sides(name: str, num_peers: int, rows: int | None, least: int) -> tuple[int, int]:
    """(rows, columns), both at least ``least``: as given, or as square as possible."""
    fits = [r for r in range(least, math.isqrt(num_peers) + 1) if num_peers % r == 0]
    if rows is None and fits:
        rows = fits[-1]
    if rows is None or rows < least or num_peers % rows or num_peers // rows < least:
        got = f"num_peers={num_peers}" + (f", rows={rows}" if rows is not None else "")
        good = [n for n in range(max(1, num_peers - 8), num_peers + 9) if sized(n, least)]
        hint = f"try rows={' or '.join(map(str, fits))}" if fits else f"try {' or '.join(map(str, good[:4]))} peers"
        raise refuse(name, f"num_peers = rows x columns with both at least {least}", got, hint)
    return rows, num_peers // rows


def sized(n: int, least: int) -> bool:
    """Whether n = a * b with a, b >= least."""
    return any(n % r == 0 for r in range(least, math.isqrt(n) + 1))


def grid(num_peers: int, *, rows: int | None = None) -> Links:
    """Rows x columns without wrap-around, as square as possible unless ``rows`` is given."""
    rows, columns = sides("grid", num_peers, rows, 1)
    ids = np.arange(num_peers).reshape(rows, columns)
    across, down = (ids[:, :-1].ravel(), ids[:, 1:].ravel()), (ids[:-1].ravel(), ids[1:].ravel())
    return Links.from_arcs(num_peers, np.concatenate([across[0], down[0]]), np.concatenate([across[1], down[1]]))


def torus(num_peers: int, *, rows: int | None = None) -> Lattice:
    """Rows x columns with wrap-around, degree 4; both sides at least 3, for a side of 2 would double its links."""
    return Lattice(sides("torus", num_peers, rows, 3), [(0, 1), (0, -1), (1, 0), (-1, 0)])


def dimension(name: str, num_peers: int) -> int:
    """log2(n) of a power of two."""
    d = num_peers.bit_length() - 1
    if num_peers != 2**d:
        raise refuse(name, "num_peers = 2^d", num_peers, f"try {2**d} or {2 ** (d + 1)}")
    return d


def hypercube(num_peers: int) -> Lattice:
    """Ids that differ in one bit; n = 2^d."""
    d = dimension("hypercube", num_peers)
    return Lattice((2,) * d, np.eye(d, dtype=np.int64)) if d else Lattice((1,), [(0,)])


def circular_ladder(num_peers: int) -> Links:
    """Two rings of n / 2 joined by rungs; n even, at least 6."""
    if num_peers < 6 or num_peers % 2:
        raise refuse("circular_ladder", "an even num_peers of at least 6", num_peers)
    return Links.from_networkx(nx.circular_ladder_graph(num_peers // 2))


def petersen(num_peers: int) -> Links:
    """The Petersen graph: 10 peers of degree 3, diameter 2."""
    return Links.from_networkx(_named("petersen", nx.petersen_graph(), num_peers))


def karate_club(num_peers: int) -> Links:
    """Friendships in a karate club of 34 (Zachary 1977)."""
    return Links.from_networkx(_named("karate_club", nx.karate_club_graph(), num_peers))


def davis_women(num_peers: int) -> Links:
    """Southern women, two linked if they and an event meet, women and events alike: 32 peers (Davis et al. 1941)."""
    graph = nx.convert_node_labels_to_integers(nx.davis_southern_women_graph())
    return Links.from_networkx(_named("davis_women", graph, num_peers))


def _named(name: str, graph: nx.Graph, num_peers: int) -> nx.Graph:
    if graph.number_of_nodes() != num_peers:
        raise refuse(name, f"num_peers={graph.number_of_nodes()}", num_peers)
    return graph


def margulis_gabber_galil(num_peers: int) -> Links:
    """Expander on Z_m x Z_m, n = m^2, degree at most 8, loops and double links dropped (Gabber, Galil 1981)."""
    m = math.isqrt(num_peers)
    if m * m != num_peers:
        raise refuse("margulis_gabber_galil", "num_peers = m^2", num_peers, f"try {m * m} or {(m + 1) ** 2}")
    x, y = np.divmod(np.arange(num_peers), m)
    ends = [((x + 2 * y) % m, y), ((x + 2 * y + 1) % m, y), (x, (y + 2 * x) % m), (x, (y + 2 * x + 1) % m)]
    return Links.from_arcs(num_peers, np.tile(np.arange(num_peers), 4), np.concatenate([a * m + b for a, b in ends]))


def paley(num_peers: int) -> Lattice:
    """Ids whose difference is a square modulo n; n prime and 1 modulo 4, degree (n-1)/2, SLEM about 1/sqrt(n)."""
    if not _paley_size(num_peers):
        good = sorted((n for n in range(2, 2 * num_peers + 8) if _paley_size(n)), key=lambda n: abs(n - num_peers))
        hint = f"try {' or '.join(map(str, sorted(good[:2])))}"
        raise refuse("paley", "num_peers prime and 1 modulo 4", num_peers, hint)
    return Lattice((num_peers,), np.unique(np.arange(1, num_peers) ** 2 % num_peers)[:, None])


def _paley_size(n: int) -> bool:
    return n % 4 == 1 and n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def barbell(num_peers: int, *, clique: int | None = None) -> Links:
    """Two cliques joined by a link, or by a path of what is left over; clique = n // 2."""
    clique = num_peers // 2 if clique is None else clique
    if clique < 2 or 2 * clique > num_peers:
        got = f"clique={clique}, num_peers={num_peers}"
        raise refuse("barbell", "clique of at least 2 and at most num_peers / 2", got)
    return Links.from_networkx(nx.barbell_graph(clique, num_peers - 2 * clique))


def caveman(num_peers: int, *, clique: int | None = None) -> Links:
    """Cliques in a ring, one link of each moved to the next clique; n = cliques x clique (Watts 1999)."""
    clique = sides("caveman", num_peers, None, 2)[1] if clique is None else clique
    if clique < 3 or num_peers % clique or num_peers // clique < 2:
        got = f"num_peers={num_peers}, clique={clique}"
        raise refuse("caveman", "num_peers = cliques x clique, at least 2 cliques of at least 3", got)
    return Links.from_networkx(nx.connected_caveman_graph(num_peers // clique, clique))


def lollipop(num_peers: int, *, clique: int | None = None) -> Links:
    """A clique with a path on it; clique = ceil(n / 2)."""
    clique = (num_peers + 1) // 2 if clique is None else clique
    if not 1 <= clique <= num_peers:
        raise refuse("lollipop", "clique between 1 and num_peers", f"clique={clique}, num_peers={num_peers}")
    ids = np.arange(num_peers)
    i, j = np.triu_indices(clique, k=1)
    return Links.from_arcs(num_peers, np.r_[i, ids[clique - 1 : -1]], np.r_[j, ids[clique:]])


def tree(num_peers: int, *, branching: int = 2) -> Links:
    """Parent of i is (i - 1) // branching: balanced for n = (b^(h+1) - 1) / (b - 1), its last level unfinished else."""
    if branching < 1:
        raise refuse("tree", "branching of at least 1", branching)
    ids = np.arange(1, num_peers)
    return Links.from_arcs(num_peers, (ids - 1) // branching, ids)


def binomial_tree(num_peers: int) -> Links:
    """Parent of i is i without its lowest bit: the tree of a broadcast in log2 n steps; any n."""
    ids = np.arange(1, num_peers)
    return Links.from_arcs(num_peers, ids & (ids - 1), ids)


GRAPHS: dict[str, Entry] = {
    "path": Entry(path, "a line of peers"),
    "ring": Entry(ring, "each peer with its two neighbours"),
    "star": Entry(star, "peer 0 with everybody else"),
    "wheel": Entry(wheel, "a star whose leaves form a ring"),
    "complete": Entry(complete, "everybody with everybody: exact averaging in one round"),
    "complete_bipartite": Entry(complete_bipartite, "each of the first `left` peers with each of the others (left)"),
    "grid": Entry(grid, "rows x columns (rows)"),
    "torus": Entry(torus, "rows x columns with wrap-around, both at least 3 (rows)"),
    "circular_ladder": Entry(circular_ladder, "two rings joined by rungs"),
    "hypercube": Entry(hypercube, "ids that differ in one bit; n = 2^d"),
    "petersen": Entry(petersen, "the Petersen graph, n = 10", {}, 10),
    "margulis_gabber_galil": Entry(margulis_gabber_galil, "expander of degree at most 8 on n = m^2 peers"),
    "paley": Entry(paley, "expander: differences that are squares modulo a prime n = 1 mod 4", {}, 17),
    "barbell": Entry(barbell, "two cliques joined by a link or a path (clique)"),
    "caveman": Entry(caveman, "cliques joined to a ring (clique)"),
    "lollipop": Entry(lollipop, "a clique with a path (clique)"),
    "tree": Entry(tree, "the balanced tree, filled level by level (branching)", {}, 15),
    "binomial_tree": Entry(binomial_tree, "the tree of a logarithmic broadcast"),
    "karate_club": Entry(karate_club, "Zachary's karate club, n = 34", {}, 34),
    "davis_women": Entry(davis_women, "Davis's southern women and their events, n = 32", {}, 32),
}
