"""Exact diffusion and D2: each peer adds what mixing did to it in the last round, which takes the bias of unequal
data off."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import all_of, check_rule, corrected, doubly_stochastic
from dfl.wrappers.stability import TOLERANCE, Mix, growth, name_of, smallest_eigenvalue

MEMORY = "diffusion.memory"


def exact_diffusion(rule: Rule, *, layout: Layout) -> Rule:
    """Add what mixing did in the last round, and go half of the way (Exact diffusion, NIDS).

    psi_i = x_i after the local steps; phi_i = psi_i + m_i, m_i = x_i at the round's start - psi_i of the round
    before (0 at first); x_i <- (phi_i + sum_j w_ij phi_j) / 2, the rule's own mix of phi. All (D,). sum_i m_i = 0
    for doubly stochastic W, so that the network mean moves by the mean local step alone. The fixed point is the
    optimum of all for one local step a round, whatever the data; with more of them `led` is exact and this is not.
    One message, as without. On W(t) that change the fixed point is the same, but on sparse ones disagreement may
    grow: then it is refused. Yuan, Ying, Zhao, Sayed 2018, arXiv 1702.05122; Li, Shi, Yan 2019, arXiv 1704.07807
    (NIDS, which does not mix in its first round).
    """
    return _diffusion("exact_diffusion", rule, layout, half=True)


def d2(rule: Rule, *, layout: Layout) -> Rule:
    """Add what mixing did in the last round, and mix all the way (D2).

    psi_i = x_i after the local steps;  phi_i = psi_i + x_i at the round's start - psi_i of the round before;  x_i <-
    sum_j w_ij phi_j. All (D,). As exact_diffusion, with W in place of (I + W) / 2: faster, and it diverges where
    lambda_min(W) < -1/3, which is refused. Written in displacements, so that the learning rate may change. One message.
    Tang, Lian, Yan, Zhang, Liu 2018, arXiv 1803.07068.
    """
    return _diffusion("d2", rule, layout, half=False)


def _diffusion(name: str, rule: Rule, layout: Layout, half: bool) -> Rule:
    check_rule(name, rule)

    def init(x: Tensor) -> State:
        return {**rule.init(x), MEMORY: torch.zeros_like(x)}

    def ahead(x: Tensor, state: State, round: Round) -> Tensor:
        """phi: what a group that is not trained is mixed without."""
        phi = x.clone()
        for group in corrected(layout, round):
            cut = layout.groups[group]
            phi[cut] += state[MEMORY][cut]
        return phi

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(ahead(x, state, round), state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        phi = ahead(x, state, round)
        out, inner = rule.mix(phi, inbox, state, round)
        memory = state[MEMORY].clone()
        for group in corrected(layout, round):
            cut = layout.groups[group]
            if half:
                out[cut] = (out[cut] + phi[cut]) / 2
            memory[cut] = out[cut] - x[cut]
        return out, {**inner, MEMORY: memory}

    return rule._replace(init=init, send=send, mix=mix, linear=False, conserves=True, remembers=True,
                         check=all_of(rule.check, doubly_stochastic(name), _stable(name, half)))


def _stable(name: str, half: bool) -> Callable[[object], None]:
    """ValueError for W(t) under which disagreement grows by itself."""
    def recursion(mix: Mix, t: int, state: np.ndarray) -> np.ndarray:
        x, memory = state
        phi = x + memory
        new = (phi + mix(phi)) / 2 if half else mix(phi)
        return np.stack([new, new - x])

    def check(topology) -> None:
        smallest = smallest_eigenvalue(topology)
        if smallest is None:
            factor = growth(topology, recursion, 2)
            if factor > TOLERANCE:
                raise ValueError(f"wrapper.name = {name!r} diverges on topology.name = {name_of(topology)!r}: disagreement "
                                 f"grows by {factor:.3f} a round; allowed: a graph that stays the same with symmetric "
                                 "weights, a denser one, or wrapper: gradient_tracking")
        elif not half and smallest < -1 / 3 - 1e-9:
            raise ValueError(f"wrapper.name = {name!r} diverges where lambda_min(W) < -1/3, and that of topology.name = "
                             f"{name_of(topology)!r} is {smallest:.4f}; allowed: wrapper: exact_diffusion, or weights: lazy")
    return check
