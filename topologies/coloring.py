"""Proper edge colouring: the links of a graph as few matchings."""

from __future__ import annotations

from topologies.links import Links


def matchings(links: Links) -> list[list[tuple[int, int]]]:
    """The edges of an undirected graph in at most (largest degree + 1) matchings (Misra, Gries 1992; Vizing 1964).

    >>> from topologies.graphs import ring
    >>> matchings(ring(4).links)
    [[(0, 1), (2, 3)], [(1, 2), (0, 3)]]
    """
    colouring = _Colouring(links)
    for u, v in zip(*(ends.tolist() for ends in links.edges), strict=True):
        colouring.add(u, v)
    found: dict[int, list[tuple[int, int]]] = {}
    for u, v in zip(*(ends.tolist() for ends in links.edges), strict=True):
        found.setdefault(colouring.of(u, v), []).append((u, v))
    return [found[colour] for colour in sorted(found)]


class _Colouring:
    """``at[u][colour]`` is the neighbour that u is linked to by an edge of that colour."""

    def __init__(self, links: Links):
        self.colours = int(links.in_degree.max(initial=0)) + 1
        self.at: list[dict[int, int]] = [{} for _ in range(links.num_peers)]

    def of(self, u: int, v: int) -> int:
        return next(colour for colour, other in self.at[u].items() if other == v)

    def free(self, u: int) -> int:
        return next(colour for colour in range(self.colours) if colour not in self.at[u])

    def add(self, u: int, v: int) -> None:
        shared = next((c for c in range(self.colours) if c not in self.at[u] and c not in self.at[v]), None)
        if shared is not None:  # the simple case also keeps the number of colours low
            self.at[u][shared], self.at[v][shared] = v, u
            return
        fan = self._fan(u, v)
        c, d = self.free(u), self.free(fan[-1])
        if c != d:
            self._invert(u, c, d)
        # the inversion may have cut the fan: take the shortest prefix, still a fan, whose end can have colour d
        for w in range(len(fan)):
            if d not in self.at[fan[w]] and self._is_fan(u, fan[: w + 1]):
                self._rotate(u, fan[: w + 1], d)
                return
        raise AssertionError("a fan with a free colour exists by Vizing's theorem")

    def _fan(self, u: int, v: int) -> list[int]:
        """A maximal fan of u: each edge u - fan[k + 1] has a colour that is free at fan[k]."""
        fan, grown = [v], True
        while grown:
            grown = False
            for colour, other in self.at[u].items():
                if other not in fan and colour not in self.at[fan[-1]]:
                    fan.append(other)
                    grown = True
                    break
        return fan

    def _is_fan(self, u: int, fan: list[int]) -> bool:
        return all(self.of(u, after) not in self.at[before] for before, after in zip(fan, fan[1:], strict=False))

    def _invert(self, u: int, c: int, d: int) -> None:
        """Swaps colours c and d on the path of these colours that begins at u (c is free at u)."""
        path, colour = [u], d
        while colour in self.at[path[-1]]:
            path.append(self.at[path[-1]][colour])
            colour = c if colour == d else d
        for node in path:
            mine = self.at[node]
            mine[c], mine[d] = mine.get(d), mine.get(c)
            for colour in (c, d):
                if mine[colour] is None:
                    del mine[colour]

    def _rotate(self, u: int, fan: list[int], d: int) -> None:
        """Each fan edge takes the colour of the next, the last one takes d."""
        colours = [self.of(u, w) for w in fan[1:]] + [d]
        for w, colour in zip(fan[1:], colours, strict=False):
            del self.at[w][colour]
        for w, colour in zip(fan, colours, strict=True):
            self.at[u][colour], self.at[w][colour] = w, u
