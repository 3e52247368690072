"""Ways on which parts of a message get lost: packets in error, one by one or in bursts, and what stands for them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dfl.channels.repeats import how_often
from dfl.plugins import by_link, check_choice, check_count, check_number
from dfl.slots import Channel, Link, Message, State

MODES = ("substitute_own", "renormalise", "zero_fill", "stale", "retransmit", "additive")
Chance = Callable[[Link, State], tuple[float, State]]  # that a segment is lost now, and the link's state after it


def segments(*, rate: float | Sequence | str = 0.1, count: int = 10, mode: str = "substitute_own", attempts: int = 3,
             sigma: float = 0.1, aggregations: int | str = 1, most: int = 20, peers: int | None = None) -> Channel:
    """Lose segments of messages at a rate of their link, with six ways to fill what is missing (imperfect channels).

    A message is `count` segments of equal length, and e_ij in {0, 1} says whether one of them comes from j to i: it is
    lost with probability rate, a number or a matrix [receiver][sender] (or a file of one, comma-separated). What i then
    mixes, mode:
    substitute_own, x_i + sum_j w_ij e_ij (x_j - x_i), its own numbers for those lost: never changes the scale;
    renormalise, (w_ii x_i + sum_j w_ij e_ij x_j) / (w_ii + sum_j w_ij e_ij);
    zero_fill, w_ii x_i + sum_j w_ij e_ij x_j: shrinks the model, and its products twice;
    stale, the last segment that came from j in place of x_j, its own before the first;
    retransmit, sent again up to `attempts` times in all, all of them counted, then substitute_own;
    additive, what is in error arrives, with Gaussian noise of `sigma` on each number.
    Rows of the effective W sum to one but for zero_fill; the network mean is kept in expectation where rates are equal
    both ways, under substitute_own and retransmit. aggregations: exchanges a round, or auto, at most `most`
    (`dfl.channels.repeats`). A message that means something only as a whole, or is not as long as the receiver's, is lost
    with its first segment. Li, Lv, Ni, Zhao, Hossain, Poor 2024, arXiv 2405.12894; Ye, Liang, Li 2021, arXiv 2108.02397
    (Soft-DSGD, substitute_own); how the first handles what is lost is not known to us.
    """
    chance = by_link("channel.rate", rate, peers, most=1.0)
    return _segmented(lambda link, state: (chance(link.sender, link.receiver), state), count, mode, attempts, sigma,
                      aggregations, most, rate=chance)


def bursts(*, to_bad: float = 0.05, to_good: float = 0.2, loss: float = 1.0, count: int = 1, mode: str = "substitute_own",
           attempts: int = 3, sigma: float = 0.1, aggregations: int | str = 1, most: int = 20) -> Channel:
    """Lose segments in bursts: a link is good or bad for a while (Gilbert-Elliott).

    Each round a good link turns bad with probability to_bad = a, a bad one good with to_good = b; in a bad one each of
    `count` segments is lost with probability loss = q. The mean loss is q a / (a + b), a burst takes 1 / b rounds on
    average; the first state is drawn from the long-run shares. modes as in `segments`. Gilbert 1960; Elliott 1963.
    """
    for field, value in (("to_bad", to_bad), ("to_good", to_good), ("loss", loss)):
        check_number(f"channel.{field}", value, most=1.0)
    share = to_bad / (to_bad + to_good) if to_bad + to_good else 0.0

    def chance(link: Link, state: State) -> tuple[float, State]:
        draw, bad = np.random.Generator(np.random.Philox(link.key ^ 1)).random(), share
        if "bad" in state:
            steps = max(1, link.t - int(state["t"]))
            bad = share + (float(state["bad"]) - share) * (1 - to_bad - to_good) ** steps
        now = torch.tensor(draw < bad)
        return loss * float(now), state | {"bad": now, "t": torch.tensor(link.t)}

    return _segmented(chance, count, mode, attempts, sigma, aggregations, most, rate=lambda sender, receiver: loss * share)


def _segmented(chance: Chance, count: int, mode: str, attempts: int, sigma: float, aggregations: int | str, most: int,
               rate: Callable[[int, int], float]) -> Channel:
    """rate(sender, receiver): the mean of `chance`."""
    check_count("channel.count", count)
    check_choice("channel.mode", mode, MODES)
    check_count("channel.attempts", attempts)
    check_number("channel.sigma", sigma)
    tries = attempts if mode == "retransmit" else 1

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        if message is None:
            return None, state
        probability, state = chance(link, state)
        draws = np.random.Generator(np.random.Philox(link.key)).random((tries, count)) < probability
        failed = np.asarray(draws.all(0))
        if mode == "retransmit":
            sent = np.where(failed, tries, 1 + draws.argmin(0)).mean()
            state = state | {"sent": torch.tensor(sent, dtype=torch.float64)}
        lost = _masks(message, failed)
        if mode == "additive":
            return _noisy(message, lost, sigma, link.key), state
        if mode == "stale" and not link.held:  # else the receiver does it, and its sender has to know what is missing
            return _stale(message, lost, state)
        if mode in ("substitute_own", "retransmit") and failed.all():
            return None, state
        return message._replace(lost=lost), state

    def injects(receiver: int, weights: Mapping[int, float], square: float) -> float:
        at = [(weight, rate(j, receiver)) for j, weight in weights.items() if j != receiver]
        if mode == "additive":
            return sigma ** 2 * sum(p * weight ** 2 for weight, p in at)
        return square * (sum(weight * p for weight, p in at) ** 2 + sum(weight ** 2 * p * (1 - p) for weight, p in at))

    fill = {"renormalise": renormalised, "zero_fill": zero_filled}.get(mode)
    return Channel(lambda: {}, deliver, fill=fill, repeats=mode == "retransmit", **how_often(aggregations, most),
                   injects=injects if mode in ("additive", "zero_fill") else None, facts={"mode": mode, "segments": count})


def _masks(message: Message, failed: np.ndarray) -> dict[str, Tensor]:
    """The numbers in failed segments, by part: the parts one after the other, in as many equal pieces as there are segments."""
    sizes = [part.numel() for part in message.parts.values()]
    if not failed.any() or not sum(sizes):
        return {}
    ends = np.linspace(0, sum(sizes), len(failed) + 1).round().astype(int)
    whole = torch.from_numpy(np.repeat(failed, np.diff(ends))).split(sizes)
    return {name: mask.to(part.device) for (name, part), mask in zip(message.parts.items(), whole, strict=True) if mask.any()}


def _noisy(message: Message, lost: Mapping[str, Tensor], sigma: float, key: int) -> Message:
    return message._replace(parts={name: part + sigma * gaussian(part, key, name) * lost[name] if name in lost else part
                                   for name, part in message.parts.items()})


def gaussian(part: Tensor, key: int, name: str) -> Tensor:
    """Standard normal numbers like `part`, the same wherever it lies."""
    generator = torch.Generator().manual_seed((key + sum(map(ord, name))) % 2**63)
    return torch.randn(part.shape, generator=generator, dtype=part.dtype).to(part.device)


def _stale(message: Message, lost: Mapping[str, Tensor], state: State) -> tuple[Message, State]:
    """With the numbers that came last in place of those that are lost; some have never come."""
    parts, never = {}, {}
    for name, part in message.parts.items():
        before, missing = state.get(f"part.{name}"), state.get(f"never.{name}")
        now = lost.get(name)
        if before is None or missing is None or before.shape != part.shape or now is None:
            parts[name], left = part, now
        else:
            parts[name], left = torch.where(now, before, part), now & missing
        state = state | {f"part.{name}": parts[name].clone(),
                         f"never.{name}": torch.zeros_like(part, dtype=torch.bool) if left is None else left}
        if left is not None and left.any():
            never[name] = left
    return Message(parts, message.meta, never), state


def zero_filled(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float]) -> dict[int, Message]:
    """Zeros for the numbers that were lost."""
    return {j: Message({name: part.masked_fill(message.lost[name], 0) if name in message.lost else part
                        for name, part in message.parts.items()}, message.meta) for j, message in inbox.items()}


def renormalised(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float]) -> dict[int, Message]:
    """The weighted mean of what arrived and the own for the numbers that were lost: then the sum with all weights is that mean."""
    mine = next(weight for j, weight in weights.items() if j not in inbox)
    means = {}
    for name in {name for message in inbox.values() for name in message.lost}:
        total, mass = own.parts[name] * mine, torch.full_like(own.parts[name], mine)
        for j in sorted(inbox):
            here = ~inbox[j].lost[name] if name in inbox[j].lost else torch.ones_like(mass, dtype=torch.bool)
            total = total + torch.where(here, inbox[j].parts[name], 0) * weights[j]
            mass = mass + here.to(mass) * weights[j]
        means[name] = torch.where(mass > 0, total / mass, own.parts[name])
    return {j: Message({name: torch.where(message.lost[name], means[name], part) if name in message.lost else part
                        for name, part in message.parts.items()}, message.meta) for j, message in inbox.items()}
