"""No clock."""

from dfl.slots import Network


def none() -> Network:
    """Simulate no time: messages take as long as they take."""
    return Network()
