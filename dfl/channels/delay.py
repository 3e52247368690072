"""A way that takes its time."""

import numpy as np
import torch

from dfl.plugins import check_count
from dfl.slots import Channel, Link, Message, State


def delay(*, by: int = 1, jitter: int = 0) -> Channel:
    """Deliver every message some rounds later (asynchronous gossip of bounded delay).

    What j sends in round t is mixed by i in round t + d, d = by, or drawn from by .. by + jitter for each message:
    x_i <- w_ii x_i(t) + sum_j w_ij x_j(t - d). Of several that are there the newest counts, and none older than
    the last; where none is there the weight stays with the receiver. Rows of the effective W sum to one, so that it is
    stable at any delay; the network mean follows late. Bounded delay: Tsitsiklis, Bertsekas, Athans 1986.
    """
    check_count("channel.by", by, least=0)
    check_count("channel.jitter", jitter, least=0)

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        state = dict(state)
        if message is not None:
            late = by + int(np.random.Generator(np.random.Philox(link.key)).integers(0, jitter + 1))
            state |= {f"{link.t}.due": torch.tensor(link.t + late)}
            state |= {f"{link.t}.part.{name}": part.clone() for name, part in message.parts.items()}
            state |= {f"{link.t}.meta.{name}": value.clone() for name, value in message.meta.items()}
        waiting = sorted(int(name.partition(".")[0]) for name in state if name.endswith(".due"))
        there = [t for t in waiting if int(state[f"{t}.due"]) <= link.t]
        if not there:
            return None, state
        found = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{there[-1]}.")}
        # what was sent before it is of no use any more
        state = {name: value for name, value in state.items() if int(name.partition(".")[0]) > there[-1]}
        return Message(*({name.removeprefix(kind): value for name, value in found.items() if name.startswith(kind)}
                         for kind in ("part.", "meta."))), state

    return Channel(lambda: {}, deliver, delays=True, facts={"delay": by, "jitter": jitter})
