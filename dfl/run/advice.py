"""What a recipe that names no method is told: which one is likelier to suit it, and what that rests on."""

from dfl.config import Config

WHERE = "benchmarks/README.md, What to use when"


def advice(config: Config) -> str | None:
    """A line, or None where the recipe chooses itself."""
    if config.model_fields_set & {"method", "schedule", "rule"}:
        return None
    name, reason = _likelier(config)
    return f"no method is named, so it is {config.method.name}; {name} is likelier to suit: {reason} ({WHERE})"


def _likelier(config: Config) -> tuple[str, str]:
    if not isinstance(config.lora.rank, int):
        return "carry", "ranks may differ, and it mixes products without padding; three seeds of the matrix toy"
    if config.partition.name != "iid":
        return "decaf", f"with partition = {config.partition.name} peers hold unlike examples; it was 12 points ahead of lora in " \
                        "one grid with one seed, and tad was below lora in three of three pairs with rates searched for both"
    return "lora", "examples are dealt alike, and no method was ever ahead of the cheapest there"
