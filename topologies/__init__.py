"""Graphs, time-varying sequences, mixing weights and their spectra, for gossip on n peers. Needs numpy and networkx only.

>>> import topologies
>>> ring = topologies.build("ring", 4)
>>> ring.neighbors(0, 1)
{0: 0.3333333333333333, 1: 0.33333333333333337, 2: 0.3333333333333333}
>>> topologies.spectrum.slem(ring.matrix(0)).__round__(6)
0.333333
"""

from topologies import spectrum
from topologies.catalogue import build, describe, names, static_graph
from topologies.topology import Topology

__all__ = ["Topology", "build", "describe", "names", "spectrum", "static_graph"]
