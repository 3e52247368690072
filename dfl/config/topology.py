"""The topology of a configuration; without torch, for reports."""

import topologies
from dfl.config import Config
from dfl.seeds import derive


def build_topology(config: Config):
    seed = config.seed if config.topology_seed is None else config.topology_seed
    topology = topologies.build(config.topology.name, config.peers, seed=derive(seed, "topology"), **config.topology.params)
    check_averages(topology)
    return topology


def check_averages(topology) -> None:
    """ValueError for a topology of which only the columns of W sum to one; what does not say which sums do passes."""
    if getattr(topology, "sums", None) == "column":
        raise ValueError(f"topology.name = {topology.name!r} has columns that sum to one, but not rows: receivers would not "
                         "average; allowed: weights that are doubly or row stochastic")
