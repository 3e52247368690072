"""How often peers exchange and mix in one round, as a parameter of channels."""

from typing import Any

from dfl.plugins import check_count

AUTO = "auto"


def how_often(aggregations: int | str, most: int) -> dict[str, Any]:
    """The traits of a channel for `aggregations`, a number or auto, and the largest number that auto may choose."""
    check_count("channel.most", most)
    if aggregations == AUTO:
        return {"aggregations": None, "most": most}
    if isinstance(aggregations, str):
        raise ValueError(f"channel.aggregations = {aggregations!r} is not allowed; allowed: auto, or a whole number from 1")
    check_count("channel.aggregations", aggregations)
    return {"aggregations": aggregations}
