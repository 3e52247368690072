"""A way that adds noise."""

from collections.abc import Mapping

from dfl.channels.repeats import how_often
from dfl.channels.segments import gaussian
from dfl.plugins import check_number
from dfl.slots import Channel, Link, Message, State


def noise(*, sigma: float | None = None, snr: float | None = None, aggregations: int | str = 1, most: int = 20) -> Channel:
    """Add Gaussian noise to every number of every message.

    x_j + z with independent z ~ N(0, sigma²) of each link and number, or, with snr in decibels, of variance 10^(-snr /
    10) times the message's mean square. The network mean moves by (1/N) sum_ij w_ij z_ij, which is zero in expectation
    and adds up over the rounds. aggregations: exchanges a round, or auto, at most `most`: each injects the variance
    sum_j w_ij² sigma², so that there is a best number. Of imperfect channels: Li et al. 2024, arXiv 2405.12894.
    """
    if (sigma is None) == (snr is None):
        raise ValueError(f"channel.sigma = {sigma}, channel.snr = {snr}: noise needs one of them; allowed: one number, the other null")
    if sigma is not None:
        check_number("channel.sigma", sigma)
    else:
        check_number("channel.snr", snr, least=-100.0, most=300.0)
    share = 0.0 if snr is None else 10 ** (-snr / 10)

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        if message is None:
            return None, state
        size = sigma
        if size is None:
            numbers = sum(part.numel() for part in message.parts.values())
            size = (share * sum(float(part.double().square().sum()) for part in message.parts.values()) / max(1, numbers)) ** 0.5
        if not size:
            return message, state
        parts = {name: part + size * gaussian(part, link.key, name) for name, part in message.parts.items()}
        return message._replace(parts=parts), state

    def injects(receiver: int, weights: Mapping[int, float], square: float) -> float:
        return sum(weight ** 2 for j, weight in weights.items() if j != receiver) * (share * square if sigma is None else sigma ** 2)

    return Channel(lambda: {}, deliver, injects=injects, **how_often(aggregations, most), facts={"sigma": sigma, "snr": snr})
