"""How long things take, on a simulated clock: `build(name, **parameters) -> Network`."""

from collections.abc import Callable

from dfl.networks.none import none
from dfl.slots import Network

NETWORKS: dict[str, Callable[..., Network]] = {"none": none}
