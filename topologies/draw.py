"""Pictures: the graph with its weights, W over rounds, and the consensus curve. Needs matplotlib."""

from __future__ import annotations

import io
import re
from pathlib import Path

import networkx as nx
import numpy as np

from topologies.predict import Simulation, rate, simulate
from topologies.topology import Topology

INK, ACCENT = "#22313f", "#c8502d"


def matplotlib_figure():
    """matplotlib's Figure on a canvas without a display, or an error that says how to get it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'dfl[topologies]'") from None

    def new(**options):
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        return figure

    return new


def positions(topology: Topology) -> dict[int, np.ndarray]:
    """Where to draw each peer: by the form of the graph for static ones, on a circle for sequences."""
    graph, name, n = topology.graph(0).to_undirected(), topology.name, topology.num_peers
    if topology.period != 1 or not graph.number_of_edges():
        return nx.circular_layout(graph)
    if name in ("grid", "torus"):
        return _bowed(graph, topology.base.shape[1] if name == "torus" else _columns(graph), 0.12 if name == "torus" else 0.0)
    if name in ("petersen", "circular_ladder"):
        return nx.shell_layout(graph, [range(n // 2, n), range(n // 2)], rotate=0)
    if name == "complete_bipartite":
        return nx.bipartite_layout(graph, [i for i in graph if graph.has_edge(i, n - 1)])
    if name in SPRING:
        return nx.spring_layout(graph, seed=4, iterations=200, k=1.2 / np.sqrt(n))
    return nx.circular_layout(graph)


def _bowed(graph: nx.Graph, columns: int, bow: float) -> dict[int, np.ndarray]:
    """Rows and columns, slightly curved so that links that wrap around do not lie on the others."""
    row, column = np.divmod(np.arange(len(graph)), columns)
    x, y = column + bow * (row - row.mean()) ** 2, row + bow * (column - column.mean()) ** 2
    return {i: np.array([x[i], -y[i]]) for i in graph}


# Static graphs without a form of their own.
SPRING = {"path", "star", "wheel", "tree", "binomial_tree", "random_tree", "barbell", "caveman", "lollipop", "karate_club"}
SPRING |= {"davis_women", "barabasi_albert", "random_geometric", "stochastic_block", "erdos_renyi"}
SPRING |= {"edge_list", "graphml", "networkx"}


def _columns(graph: nx.Graph) -> int:
    """A grid's longest step between ids is one row."""
    return max(abs(i - j) for i, j in graph.edges())


def draw_graph(axes, topology: Topology, t: int, place: dict) -> None:
    """Nodes and links of round t; a link is as wide as its weight."""
    graph, entries = topology.graph(t), topology.entries(t)
    arcs = zip(entries.links.sender.tolist(), entries.links.receiver.tolist(), strict=True)
    weight = dict(zip(arcs, entries.weight, strict=True))
    widths = [0.4 + 2.5 * abs(weight[edge]) for edge in graph.edges()]
    static = topology.period == 1
    size = max(5.0, (700.0 if static else 280.0) / max(8, len(graph)))
    nx.draw_networkx_nodes(graph, place, ax=axes, node_size=size, node_color=INK)
    arrows = {"arrows": True, "arrowsize": 7 if static else 4, "node_size": size} if graph.is_directed() else {}
    nx.draw_networkx_edges(graph, place, ax=axes, width=widths, edge_color=ACCENT, **arrows)
    axes.set_axis_off()
    axes.margins(0.08)
    axes.set_aspect("equal", adjustable="datalim")


def draw_matrix(axes, topology: Topology, t: int) -> None:
    W = topology.matrix(t)
    axes.imshow(np.abs(W), cmap="Greys", vmin=0, vmax=max(1e-9, np.abs(W).max()), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_curve(axes, topology: Topology, result: Simulation) -> None:
    """|x - mean| over rounds, with the predicted rate."""
    shown = np.maximum(result.distance, 1e-16)
    axes.semilogy(shown, color=INK, lw=1.2)
    predicted, _ = rate(topology, 100)
    if 0 < predicted < 1:
        rounds = np.arange(len(shown))
        axes.semilogy(rounds, np.maximum(predicted**rounds, 1e-16), color=ACCENT, lw=0.9, ls="--")
    axes.set_ylim(1e-6, 2.0)
    axes.tick_params(labelsize=6, length=2)
    axes.set_title("|x - mean|, predicted dashed", fontsize=7)


def draw(topology: Topology, rounds: int = 4, simulated: int = 30):
    """A figure: graphs of the first rounds, their W, and the consensus curve. One round is drawn of a static topology."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    shown = min(rounds, topology.period or rounds)
    figure, place = matplotlib_figure()(figsize=(8.4, 2.8)), positions(topology)
    graphs, matrices = cells(shown, 0.01, 0.37), cells(shown, 0.385, 0.655)
    for t, graph_cell, matrix_cell in zip(range(shown), graphs, matrices, strict=True):
        graph_axes, matrix_axes = figure.add_axes(graph_cell), figure.add_axes(matrix_cell)
        draw_graph(graph_axes, topology, t, place)
        draw_matrix(matrix_axes, topology, t)
        if shown > 1:
            graph_axes.set_title(f"t = {t}", fontsize=7, pad=1)
            matrix_axes.set_title(f"W({t})", fontsize=7, pad=2)
    draw_curve(figure.add_axes((0.715, 0.1, 0.275, 0.74)), topology, simulate(lambda _: topology, simulated))
    figure.suptitle(f"{topology.name}, {topology.num_peers} peers", fontsize=8, y=0.985)
    return figure


def cells(count: int, left: float, right: float) -> list[tuple[float, float, float, float]]:
    """(left, bottom, width, height) of ``count`` axes in rows of two. Placed by hand: a layout solver's rounding would
    differ from run to run, and the pictures with it."""
    across = 1 if count == 1 else 2
    rows, gap = -(-count // across), 0.07
    width, height = (right - left) / across, 0.86 / rows
    return [
        (left + k % across * width, 0.86 - (k // across + 1) * height + 0.04, width - 0.01, height - (gap if count > 1 else 0.04))
        for k in range(count)
    ]


def save(figure, path, dpi: int = 100) -> Path:
    """PNG or SVG by the file's ending. The bytes depend on the picture alone."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"output must end in .png or .svg, got {str(path)!r}")
    figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    if path.suffix == ".svg":
        path.write_text(_numbered(path.read_text()))
    return path


def _numbered(svg: str) -> str:
    """The ids that matplotlib derives from memory addresses, replaced by numbers in the order they appear."""
    order: dict[str, str] = {}
    return re.sub(r"\b(?:[a-z]|image)[0-9a-f]{10}\b", lambda found: order.setdefault(found[0], f"id{len(order)}"), svg)


def save_small(figure, path, dpi: int = 75, colours: int = 32) -> Path:
    """A PNG with few colours, for a page that shows dozens."""
    from PIL import Image  # matplotlib brings it

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    return Path(path)
