"""Links with a bandwidth and a latency."""

from collections.abc import Sequence

from dfl.plugins import by_link, by_peer
from dfl.slots import Link, Network

SMALLEST = 1e-9  # bytes a second: a link of none would take for ever


def links(*, bandwidth: float | Sequence | str = 6.25e6, latency: float | Sequence | str = 0.05,
          compute: float | Sequence[float] = 0.0, peers: int | None = None) -> Network:
    """Give every link a bandwidth and a latency: a wide area on a simulated clock.

    A message of b bytes that j sends to i when its clock shows c_j is there at c_j + latency_ij + b / bandwidth_ij; i
    mixes when the last one is: c_i <- max(c_i, max_j arrival). A local phase of K steps takes K compute_i. Nobody waits
    for who is silent. Messages to several neighbours travel side by side. bandwidth, in bytes a second, and latency, in
    seconds: one number, a matrix [receiver][sender] or a file of one, comma-separated; 50 Mbit/s and 50 ms unless given.
    compute: seconds a local step, one number or one for each peer.
    """
    fast, late = by_link("network.bandwidth", bandwidth, peers, least=SMALLEST), by_link("network.latency", latency, peers)
    steps = by_peer("network.compute", compute, peers)

    def seconds(link: Link, num_bytes: int) -> float:
        return late(link.sender, link.receiver) + num_bytes / fast(link.sender, link.receiver)

    return Network(seconds, lambda t, peer, local_steps: local_steps * steps(peer), timed=True)
