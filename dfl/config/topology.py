"""The topology of a configuration; without torch, for reports."""

import topologies
from dfl.config import Config
from dfl.seeds import derive
from topologies.topology import Topology


def build_topology(config: Config) -> Topology:
    seed = config.seed if config.topology_seed is None else config.topology_seed
    return topologies.build(config.topology.name, config.peers, seed=derive(seed, "topology"), **config.topology.params)
