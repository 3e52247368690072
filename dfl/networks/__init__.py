"""How long things take, on a simulated clock: `build(name, **parameters) -> Network`."""

from collections.abc import Callable

from dfl.networks.links import links
from dfl.networks.none import none
from dfl.networks.trace import trace
from dfl.slots import Network

NETWORKS: dict[str, Callable[..., Network]] = {"none": none, "links": links, "trace": trace}
