"""Noise once, then gossip many times: peers far away learn less of one than those beside it (Muffliato)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_count, check_number, check_positive
from dfl.seeds import derive
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import all_of, check_rule, doubly_stochastic

START, NOW, BEFORE = ("muffliato." + name for name in ("start", "now", "before"))


def muffliato(rule: Rule, *, layout: Layout, sigma: float, clip: float | None = None, steps: int | None = None, seed: int = 0,
              topology: Any = None) -> Rule:
    """Add noise once a round and gossip until it has averaged out (Muffliato): privacy that grows with the distance.

    x_0 = start + clip(x - start) + N(0, (sigma c)^2), (D,), where start is the row before the local phase and clip(v) = v
    min(1, c / ||v||), c = `clip` (none: nothing is cut, and c = 1); x_1 = W x_0; x_{k+1} = g W x_k + (1 - g) x_{k-1}, g = 2
    (1 - sqrt(l (1 - l / 4))) / (1 - l / 2)^2, l = 1 - lambda_2(W); the new row is x_K. K = `steps`, none: ceil(ln((n /
    sigma^2) max(1/4, sigma^2)) / sqrt(l)), after which the distance from the mean is of the size of the noise in it. The
    mean of all rows moves by the mean of the clipped steps and of the noise, whose variance is (sigma c)^2 / n. What one
    peer learns of another is `losses`, never more than alpha / (2 sigma^2), what the noise itself gives (Renyi, of a change
    of norm c). K messages a round. W symmetric and the same in every round. sigma = 0, K = 1: the rule as it is. The noise
    follows from `seed`: for studies, since who knows it can take it off. Cyffers, Even, Bellet, Massoulie 2022, arXiv
    2206.05091.
    """
    check_rule("muffliato", rule)
    check_number("wrapper.sigma", sigma)
    if clip is not None:
        check_positive("wrapper.clip", clip)
    if steps is not None:
        check_count("wrapper.steps", steps)
    elif sigma == 0:
        raise ValueError("wrapper.sigma = 0 needs no averaging out: wrapper.steps = null follows from it; allowed: a number of steps")
    second = 0.0 if topology is None else second_eigenvalue(topology)
    num = 1 if topology is None else topology.num_peers
    last = num_steps(num, sigma, second) if steps is None else steps
    weight = acceleration(second)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone()}

    def noisy(x: Tensor, state: State, round: Round) -> Tensor:
        change, noise = x - state[START], torch.Generator().manual_seed(derive(seed, "muffliato", round.peer, round.t))
        kept = torch.zeros(layout.size, dtype=torch.bool, device=x.device)
        for cut in layout.columns(round.plan.sends):
            kept[cut] = True
        size = float((change * kept).norm())
        factor = 1.0 if clip is None or size <= clip else clip / size
        drawn = sigma * (clip or 1.0) * torch.randn(layout.size, generator=noise, dtype=torch.float64).to(x)
        return torch.where(kept, x + (factor - 1) * change + drawn, x)

    def current(x: Tensor, state: State, round: Round) -> Tensor:
        return state[NOW] if round.exchange else noisy(x, state, round)

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        now = current(x, state, round)
        message, inner = rule.send(now, state, round)
        return message, {**state, **inner, NOW: now}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        now, kept = state[NOW], {key: value for key, value in state.items() if not key.startswith("muffliato.")}
        mixed, inner = rule.mix(now, inbox, kept, round)
        new = mixed.clone()
        for cut in layout.columns(round.plan.sends) if round.exchange else ():
            new[cut] = weight * mixed[cut] + (1 - weight) * state[BEFORE][cut]
        if round.exchange + 1 < last:
            return x.clone(), {**inner, START: state[START], NOW: new, BEFORE: now}
        return new, {**inner, START: new.clone()}

    return rule._replace(init=init, send=send, mix=mix, exchanges=last, linear=False, averages=False, needs="static", dated=True,
                         check=all_of(rule.check, doubly_stochastic("muffliato"), _symmetric))


def num_steps(num_peers: int, sigma: float, second: float) -> int:
    """K, at least 1."""
    return max(1, math.ceil(math.log(num_peers / sigma ** 2 * max(0.25, sigma ** 2)) / math.sqrt(max(1e-9, 1 - second))))


def acceleration(second: float) -> float:
    """g for lambda_2; 1 for a W that averages in one step."""
    gap = 1 - second
    return 1.0 if gap >= 1 else 2 * (1 - math.sqrt(gap * (1 - gap / 4))) / (1 - gap / 2) ** 2


def second_eigenvalue(topology: Any) -> float:
    """lambda_2 of W(0), not below 0."""
    w = np.asarray(topology.matrix(0))
    return 0.0 if len(w) < 2 else _second((w + w.T) / 2)


def _second(w: np.ndarray) -> float:
    return max(0.0, float(np.sort(np.linalg.eigvalsh(w))[-2]))


def polynomials(w: np.ndarray, steps: int) -> list[np.ndarray]:
    """P_k with x_k = P_k x_0, k = 0 .. steps - 1: what each exchange sends."""
    weight, found = acceleration(_second(w)), [np.eye(len(w)), w]
    for _ in range(steps - 2):
        found.append(weight * w @ found[-1] + (1 - weight) * found[-2])
    return found[:steps]


def losses(w: np.ndarray, sent: Sequence[np.ndarray], sigma: float, alpha: float) -> np.ndarray:
    """Renyi loss of order alpha of u towards v, (N, N) [u, v]: alpha / (2 sigma^2) sum_k sum_{j ~ v} (P_k)_{ju}^2 / ||(P_k)_j||^2.

    Of every message that v receives, over its exchanges P_k (`polynomials`), bounded by the alpha / (2 sigma^2) of the noise
    alone, to which u is post-processed.
    """
    linked = (np.asarray(w) != 0) & ~np.eye(len(w), dtype=bool)
    total = sum(linked.T.astype(float) @ (p ** 2 / (p ** 2).sum(1, keepdims=True)) for p in sent)  # (v, u)
    return alpha / (2 * sigma ** 2) * np.minimum(1.0, np.asarray(total).T)


def _symmetric(topology: Any) -> None:
    w = np.asarray(topology.matrix(0))
    if not np.allclose(w, w.T, rtol=0, atol=1e-9):
        raise ValueError("wrapper.name = 'muffliato' needs a symmetric W, whose eigenvalues are the speed of gossip; allowed: weights "
                         "metropolis on links that go both ways")
