"""What a recipe that names no method, or no topology, is told: which one it gets, whether another is likelier to suit it, and what
that rests on.
"""

from dfl.config import Config

WHERE = "benchmarks/README.md, What to use when"


def advice(config: Config) -> list[str]:
    """Lines; none where the recipe chooses itself."""
    return [line for line in (_method(config), _topology(config)) if line]


def _topology(config: Config) -> str | None:
    if "topology" in config.model_fields_set or config.partition.name == "iid" or config.peers < 4:
        return None
    return f"no topology is named, so it is {config.topology.name}; where peers hold unlike examples, one_peer_exponential was " \
           f"ahead of it with as many messages, and sends half as many a round; three pairs of TREC-6, not decided on SST-2 ({WHERE})"


def _method(config: Config) -> str | None:
    if config.model_fields_set & {"method", "schedule", "rule"}:
        return None
    named = f"no method is named, so it is {config.method.name}"
    if not isinstance(config.lora.rank, int):
        return f"{named}; carry is likelier to suit: ranks may differ, and it mixes products without padding; three seeds of " \
               f"TREC-6 and of the matrix toy ({WHERE})"
    if config.partition.name == "iid":
        return f"{named}: examples are dealt alike, and no method was ever ahead of the cheapest there ({WHERE})"
    return f"{named}: with partition = {config.partition.name} peers hold unlike examples, and where rates were searched for each, " \
           f"neither tad nor decaf was ahead of it by more than chance gives ({WHERE})"
