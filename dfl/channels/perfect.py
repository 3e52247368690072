"""A way on which nothing happens."""

from dfl.channels.repeats import how_often
from dfl.slots import Channel, Link, Message, State


def perfect(*, aggregations: int | str = 1) -> Channel:
    """Deliver everything as it was sent.

    aggregations: how often peers exchange and mix in one round: W(t)^J, at J times the bytes.
    """
    if aggregations == "auto":
        raise ValueError("channel.aggregations = 'auto' needs a channel that adds errors: without, more is always better; allowed: a "
                         "whole number from 1")

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        return message, state

    return Channel(lambda: {}, deliver, perfect=True, **how_often(aggregations, 1))
