"""The gallery: a small picture of every topology and the page that shows them, made by ``python -m topologies gallery``."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from topologies.catalogue import STATIC, TOPOLOGIES, build
from topologies.draw import draw, save_small
from topologies.predict import rate
from topologies.registry import parameters

DATA = Path(__file__).parent / "gallery" / "data"
# Parameters and peers of the topologies that need something from outside.
OUTSIDE = {
    "edge_list": ({"path": "edges.txt"}, 6),
    "graphml": ({"path": "florentine.graphml"}, 15),
    "networkx": ({"graph": nx.truncated_tetrahedron_graph()}, 12),
    "contact_trace": ({"path": "contacts.csv"}, 8),
    "mobility_trace": ({"path": "positions.csv", "radius": 40}, 8),
}

PAGE = """# Gallery

Every topology at a small size: the graph with links as wide as their weights, W, and what is left of the disagreement of
64 random columns after t rounds of pure averaging (dashed: predicted). Sequences show their first rounds. Made by

```sh
python -m topologies gallery
```

"""


def example(name: str):
    """(topology, what was set) of the picture of ``name``."""
    params, peers = OUTSIDE.get(name, (TOPOLOGIES[name].example, TOPOLOGIES[name].example_peers))
    located = {key: str(DATA / value) if key == "path" else value for key, value in params.items()}
    return build(name, peers, **located), params


def make(folder, names=None) -> list[Path]:
    """Draws ``names`` (all, and writes the page) into ``folder``; returns the files written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ():
        if name not in TOPOLOGIES:
            raise ValueError(f"topology {name!r} is not known; known: {', '.join(TOPOLOGIES)}")
    written = [save_small(draw(example(name)[0]), folder / f"{name}.png") for name in names or TOPOLOGIES]
    if not names:
        written.append(folder / "README.md")
        written[-1].write_text(page())
    return written


def page() -> str:
    """The page's text."""
    static = "".join(section(name) for name in STATIC)
    moving = "".join(section(name) for name in TOPOLOGIES if name not in STATIC)
    return PAGE + "## Static graphs\n\n" + static + "## Sequences\n\n" + moving.rstrip() + "\n"


def section(name: str) -> str:
    topology, params = example(name)
    found, how = rate(topology)
    speed = f"rate {found:.4f} a round ({how})" if found else how
    shown = ", ".join(f"{key}={_short(value)}" for key, value in params.items())
    takes = ", ".join(f"`{param}`" for param in parameters(TOPOLOGIES[name].factory))
    lines = [
        f"### {name}",
        "",
        f"{TOPOLOGIES[name].about[0].upper()}{TOPOLOGIES[name].about[1:]}.",
        f"Here: n = {topology.num_peers}{', ' + shown if shown else ''}; {speed}.",
        f"Parameters: {takes or 'none'}.",
        "",
        f"![{name}]({name}.png)",
    ]
    return "\n".join(lines) + "\n\n"


def _short(value) -> str:
    return value.name.lower() if isinstance(value, nx.Graph) and value.name else str(value)
