"""Over the air: what the neighbours of a peer send at once adds up on its way."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import networkx
import numpy as np
import torch
from torch import Tensor

from dfl.plugins import check_choice, check_count, check_number
from dfl.slots import Channel, Link, Message, State

PAYLOADS = ("difference", "model", "gradient")
FADINGS = ("rayleigh", "none")


def over_the_air(*, payload: str = "difference", snr: float = 20.0, fading: str = "rayleigh", least_gain: float = 0.0,
                 misalignment: float = 0.0, gamma: float = 1.0, decay: float = 0.0,
                 refresh: int = 10, topology: Any = None) -> Channel:
    """Add up what neighbours send at once, as analogue radio does: differences, models or gradients (over-the-air gossip).

    Peer i wants sum_j w_ij v_j of its neighbours. Each sends s_j = (v_j - mean v_j) / sd v_j with the precoder b_ij =
    w_ij sqrt(eta_i) sd_j conj(h_ij) / |h_ij|², eta_i = min_j P |h_ij|² / (w_ij sd_j)², so that |b_ij|² <= P with
    equality for the worst; i receives y = sum_j h_ij b_ij s_j + z and takes Re(y) / sqrt(eta_i) + sum_j w_ij mean v_j,
    which is unbiased with variance sigma² / (2 eta_i) a number; snr = 10 log10(P / sigma²). Means and deviations come
    without error. h_ij ~ CN(0, 1) drawn anew in each round, or 1 with fading none. Truncated inversion: where |h_ij|² <
    least_gain, j is silent, and its weight stays with i. misalignment m: each term is multiplied by Re(1 + delta),
    delta ~ CN(0, m²), a bias that knows the data.
    payload model, v_j = x_j: noise as large as models are, for ever. difference, v_j = x_j - r_j, what j has moved by
    since its reference r_j, which it tells all neighbours digitally in every `refresh`-th round, 0 among them: as peers
    stop moving, differences and with them the noise vanish. A silent j counts as r_j; W has to be static. gradient, v_j =
    what j's local phase changed, which `wrapper: updates` sends: noise as large as steps are. A silent j's weight stays
    with i, as for models.
    x_i <- x_i + gamma_t sum_j w_ij (x^_j - x_i), gamma_t = gamma / (t + 1)^decay: without decay the noise lets the
    network mean walk. One use of the channel a number and receiver, however many send, and one a number and sender in
    digital rounds; in a slot listen peers that are more than two links apart (`num_slots`). Zhu, Shi, Zhou, Jiang,
    Chen, Letaief 2023, arXiv 2310.10089, on the payloads of a server; the chain for gossip is ours, and so is that each
    receiver of gradients has noise of its own, which stays between the rows.
    """
    check_choice("channel.payload", payload, PAYLOADS)
    check_number("channel.snr", snr, least=-100.0, most=300.0)
    check_choice("channel.fading", fading, FADINGS)
    for field, value in (("least_gain", least_gain), ("misalignment", misalignment), ("decay", decay)):
        check_number(f"channel.{field}", value)
    check_number("channel.gamma", gamma, most=1.0)
    check_count("channel.refresh", refresh)
    if payload == "gradient" and (gamma != 1 or decay):
        raise ValueError(f"channel.gamma = {gamma} and channel.decay = {decay} pull models together more slowly, of which payload "
                         "gradient sends none; allowed: gamma 1 and decay 0, or payload difference or model")
    noise = 10 ** (-snr / 10)

    def shared(t: int) -> bool:
        return payload != "difference" or t % refresh > 0

    def air(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float], state: State,
            link: Link) -> tuple[dict[int, Message], State]:
        if not inbox:
            return {}, state
        draws = np.random.Generator(np.random.Philox(link.key))
        gains = {j: _gain(draws, fading) for j in sorted(inbox)}
        active = [j for j in sorted(inbox) if abs(gains[j]) ** 2 >= least_gain]
        mine, rows = _flat(own), {j: _flat(message) for j, message in inbox.items()}
        if not shared(link.t):
            state = {str(j): row.clone() for j, row in rows.items()}
        # what is known of a neighbour before it sends: nothing for models, in whose place the receiver's own numbers are
        known = {j: state.get(str(j), rows[j] if payload == "difference" else mine) for j in rows}
        sent = {j: rows[j] - known[j] if payload == "difference" else rows[j] for j in active}
        before = sum(weights[j] * known[j] for j in sorted(rows) if payload == "difference" or j not in active)
        total = received(sent, weights, gains, noise, misalignment, draws, like=mine) + before
        mean, step = total / sum(weights[j] for j in inbox), gamma / (link.t + 1) ** decay
        shown = _message(mine + step * (mean - mine), own)
        return dict.fromkeys(inbox, shown), state

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        return message, state

    facts = {"payload": payload} | ({} if topology is None else {"air_slots": num_slots(topology.matrix(0))})
    return Channel(lambda: {}, deliver, air=air, shared=shared, static=payload == "difference", updates=payload == "gradient",
                   facts=facts)


class Precoded(NamedTuple):
    """b_j by sender, and the receiver's scale eta."""

    b: dict[int, complex]
    eta: float


def precoders(deviations: Mapping[int, float], weights: Mapping[int, float], gains: Mapping[int, complex],
              power: float = 1.0) -> Precoded:
    """b_j = w_j sqrt(eta) sd_j conj(h_j) / |h_j|², eta = min_j P |h_j|² / (w_j sd_j)², over those with something to say."""
    loud = {j: weights[j] * deviation for j, deviation in deviations.items() if weights[j] * deviation}
    if not loud:
        return Precoded({}, float("inf"))
    eta = min(power * abs(gains[j]) ** 2 / size ** 2 for j, size in loud.items())
    return Precoded({j: size * eta ** 0.5 * gains[j].conjugate() / abs(gains[j]) ** 2 for j, size in loud.items()}, eta)


def received(payloads: Mapping[int, Tensor], weights: Mapping[int, float], gains: Mapping[int, complex], noise: float,
             misalignment: float, draws: np.random.Generator, like: Tensor) -> Tensor:
    """What a receiver takes for sum_j w_j v_j of payloads v_j (M,) that are sent at once, with noise of variance `noise`; like
    `like` (M,), zeros where nobody sends."""
    if not payloads:
        return torch.zeros_like(like)
    sizes = {j: float(v.std(correction=0)) for j, v in payloads.items()}
    b, eta = precoders(sizes, weights, gains)
    found = torch.zeros_like(like) + sum(weights[j] * payloads[j].mean() for j in sorted(payloads))
    for j in sorted(b):
        through = (gains[j] * b[j] * (1 + misalignment * complex_normal(draws))).real / eta ** 0.5
        found = found + through / sizes[j] * (payloads[j] - payloads[j].mean())
    heard = torch.from_numpy(draws.standard_normal(len(like))).to(like)
    return found + heard * (noise / (2 * eta)) ** 0.5


def complex_normal(draws: np.random.Generator) -> complex:
    """CN(0, 1)."""
    return complex(*draws.standard_normal(2)) / 2 ** 0.5


def _gain(draws: np.random.Generator, fading: str) -> complex:
    return complex_normal(draws) if fading == "rayleigh" else 1 + 0j


def num_slots(w: np.ndarray) -> int:
    """How many slots a round takes: peers that listen in one are more than two links apart, or a sender would have to send
    two things, or listen itself."""
    graph = networkx.from_numpy_array((np.asarray(w) != 0) & ~np.eye(len(w), dtype=bool))
    if not graph.number_of_edges():
        return 0
    return 1 + max(networkx.greedy_color(networkx.power(graph, 2), strategy="DSATUR").values())


def _flat(message: Message) -> Tensor:
    return torch.cat([part.flatten() for part in message.parts.values()])


def _message(row: Tensor, like: Message) -> Message:
    sizes = [part.numel() for part in like.parts.values()]
    return like._replace(parts=dict(zip(like.parts, row.split(sizes), strict=True)))
