"""A way on which messages get lost."""

import numpy as np

from dfl.slots import Channel, Link, Message, State


def lossy(*, rate: float = 0.1) -> Channel:
    """Lose each message with probability `rate`, independently of all others (a Bernoulli link).

    The receiver gives the weight of a lost message to itself: x_i <- sum over what arrived, so that row sums of W stay
    one; column sums do not, and the network mean moves where i's message is lost and j's is not. Which messages are
    lost is a function of the seed, the round and the edge: it does not depend on the hosting.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"channel.rate = {rate!r} is not allowed; allowed: a number from 0 to 1")

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        lost = np.random.Generator(np.random.Philox(link.key)).random() < rate
        return (None if lost else message), state

    return Channel(lambda: {}, deliver)
