"""One template for adapt-then-combine methods that are exact for unequal data: members, skipped rounds, a penalty."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout
from dfl.plugins import check_choice, check_share
from dfl.seeds import derive
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import all_of, check_rule, corrected, doubly_stochastic
from dfl.wrappers.proximal import make_prox
from dfl.wrappers.stability import TOLERANCE, Mix, growth, name_of

DUAL, SHIFT, HALF, BEGUN = "flexatc.dual", "flexatc.shift", "flexatc.half", "flexatc.begun"
Polynomial = tuple[float, float, float]


class Member(NamedTuple):
    """The matrices of a member as polynomials c_0 I + c_1 W + c_2 W^2: A, B^2, and (I - C) A; first: what stands for
    them in the first round, where a method does not begin with B y = 0."""

    a: Polynomial
    b: Polynomial
    base: Polynomial
    first: tuple[Polynomial, Polynomial, Polynomial] | None = None

    @property
    def matrices(self) -> tuple[Polynomial, Polynomial, Polynomial]:
        return self.a, self.b, self.base

    @property
    def exchanges(self) -> int:
        return 2 if any(polynomial[2] for polynomial in self.matrices) else 1

    @property
    def combines(self) -> bool:
        """Whether C = 0: the row alone is where the next step begins."""
        return self.base == self.a


def members(chi: float) -> dict[str, Member]:
    """By name; chi: how lazily exact diffusion mixes, A = I - (I - W) / (2 chi)."""
    part, square = 1 / (2 * chi), (1.0, -2.0, 1.0)
    lazy = (1 - part, part, 0.0)
    return {
        "ed": Member(lazy, (part, -part, 0.0), lazy),  # exact diffusion, NIDS: B^2 = I - A, C = 0
        # ATC-DIGing: A = W^2, B = I - W, C = 0; its tracker begins as the peer's own gradient
        "aug_dgm": Member((0.0, 0.0, 1.0), square, (0.0, 0.0, 1.0), ((0.0, 1.0, 0.0), (-1.0, 1.0, 0.0), (0.0, 1.0, 0.0))),
        "next": Member((0.0, 1.0, 0.0), square, (0.0, 0.0, 1.0)),  # SONATA: A = W, B = I - W, C = I - W
        "extra": Member((1.0, 0.0, 0.0), (0.5, -0.5, 0.0), (0.5, 0.5, 0.0)),  # A = I, B^2 = C = (I - W) / 2
        "diging": Member((1.0, 0.0, 0.0), square, (0.0, 0.0, 1.0)),  # A = I, B = I - W, C = I - W^2
        "dgd": Member((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),  # combine, then adapt: A = I, B = 0, C = I - W
    }


def led(rule: Rule, *, layout: Layout, share: float = 1.0) -> Rule:
    """Spread the correction of exact diffusion over the local steps (LED), which stays exact with many of them.

    K local steps phi <- phi - lr g_i(phi) - (share / K) y_i; x_i <- (phi_i + sum_j w_ij phi_j) / 2; y_i <- y_i +
    phi_i - x_i, y_i = 0 at first. All (D,). sum_i y_i = 0 for doubly stochastic W, so that the network mean moves by
    the mean step alone; where nothing moves any more, lr g_i(x) + (share / K) y_i = 0 for all peers, so that the
    gradients sum to zero. One message, as without, where gradient_tracking sends two. With K = 1 and share = 1 it is
    exact_diffusion. Alghunaim 2024, arXiv 2303.13950 (beta = share / K).
    """
    return _template("led", rule, layout, "ed", 1.0, 1.0, share, 0, "none", 0.0)


def proxskip(rule: Rule, *, layout: Layout, p: float | str = 0.2, kappa: float | None = None, chi: float = 1.0,
             penalty: str = "none", strength: float = 0.0, seed: int = 0, topology: object | None = None) -> Rule:
    """Exchange in a random part of the rounds alone, by one coin for all, and stay exact (decentralised ProxSkip).

    z_i = x_i after the round's K local steps phi <- phi - lr g_i(phi) - (p / K) y_i; with probability p, the same
    coin at every peer: x_i <- prox(z_i - sum_j w_ij (z_i - z_j) / (2 chi)), y_i <- y_i + z_i - (x_i before prox);
    else x_i <- prox(z_i). All (D,). sum_i y_i = 0. The coin is a function of (seed, t). p = 1, chi = 1 and K = 1 is
    exact_diffusion. p: auto takes the smallest that costs no rounds for an objective of condition `kappa`, sqrt((1 -
    (1 - 1 / kappa)^2) / (smallest eigenvalue of (I - W) / (2 chi) above zero)): skipping pays where the objective is
    worse conditioned than the graph. penalty, strength: see flexatc. Guo, Alghunaim, Yuan, Condat, Cao 2023, arXiv
    2310.07983.
    """
    if p == "auto":
        p = best_probability(kappa, topology, chi)
    return _template("proxskip", rule, layout, "ed", chi, p, p, seed, penalty, strength)


def flexatc(rule: Rule, *, layout: Layout, member: str = "ed", p: float = 1.0, chi: float = 1.0, penalty: str = "none",
            strength: float = 0.0, seed: int = 0) -> Rule:
    """Correct as ED, NIDS, Aug-DGM, NEXT, EXTRA or DIGing, and skip rounds; with an l1 or group penalty (FlexATC).

    z = (I - C) x - lr g(x) - B y; y <- y + B z; x <- prox(A z), of stacked rows (N, D), with A, B, C polynomials in
    W: see `members`. Kept are B y and B y + C x, one vector each, both of which sum to zero over the peers for doubly
    stochastic W; of what polynomials of degree 2 need a round exchanges twice. K local steps take a part of K of the
    correction each. `dgd` corrects nothing and keeps plain gossip's bias. penalty: a shared term strength r(x) that
    has no gradient at zero, by its proximal map with the learning rate as its step, behind every local step but the
    last before an exchange, and behind that: l1, or group, one norm for each rank-one component (A[k, :], B[:, k]).
    Needs C = 0 (ed, aug_dgm). p: rounds that exchange, by one coin for all, a function of (seed, t); needs C = 0.
    Peers are assumed to start from one row. Guo, Shi, Xu, Cao 2026, arXiv 2602.16148: its exact recursion, its list
    of members and whether its coin is common are not known to us; this template covers the members that its abstract
    names, and skipping is that of proxskip.
    """
    return _template("flexatc", rule, layout, member, chi, p, p, seed, penalty, strength)


def best_probability(kappa: float | None, topology: object | None, chi: float = 1.0) -> float:
    """The smallest p at which skipping costs no convergence: condition kappa >= 1, a symmetric W that stays the
    same."""
    if isinstance(kappa, bool) or not isinstance(kappa, (int, float)) or not kappa >= 1:
        raise ValueError(f"wrapper.p = 'auto' needs wrapper.kappa, the condition of the objective, got {kappa!r}; allowed: "
                         "a number from 1")
    if getattr(topology, "period", None) != 1:
        raise ValueError("wrapper.p = 'auto' needs a topology that is the same in every round; allowed: a number for p")
    eigenvalues = np.linalg.eigvalsh(np.eye(topology.num_peers) - np.asarray(topology.matrix(0))) / (2 * chi)
    smallest = min((value for value in eigenvalues if value > 1e-9), default=1.0)
    return float(min(1.0, ((1 - (1 - 1 / kappa) ** 2) / smallest) ** 0.5))


def coin(seed: int, p: float) -> Callable[[int], bool]:
    """t -> whether round t exchanges: with probability p, the same at every peer."""
    return lambda t: p >= 1 or derive(seed, "coin", t) / 2 ** 63 < p


def _template(name: str, rule: Rule, layout: Layout, member: str, chi: float, p: float, share: float, seed: int, penalty: str,
              strength: float) -> Rule:
    check_rule(name, rule)
    check_share("wrapper.p", p)
    check_share("wrapper.share", share)
    if isinstance(chi, bool) or not isinstance(chi, (int, float)) or not chi >= 0.5:
        raise ValueError(f"wrapper.chi = {chi!r} is not allowed; allowed: a number from 0.5 (mixing all the way); 1 "
                         "is safe on any graph that stays the same")
    table = members(chi)
    check_choice("wrapper.member", member, list(table))
    one, prox, speaks = table[member], make_prox(layout, penalty, strength), coin(seed, p)
    if not one.combines and (p < 1 or prox is not None):
        what, able = "wrapper.p below 1" if p < 1 else "wrapper.penalty", [other for other, found in table.items() if found.combines]
        raise ValueError(f"{what} needs a member whose next step begins at the row alone (C = 0), got wrapper.member = {member!r}; "
                         f"allowed: {', '.join(able)}")

    def init(x: Tensor) -> State:
        return {**rule.init(x), DUAL: torch.zeros_like(x), SHIFT: torch.zeros_like(x), BEGUN: torch.zeros(len(GROUPS))}

    def after_step(x: Tensor, state: State, round: Round, k: int) -> Tensor:
        out, groups = x.clone(), layout.present(round.plan.trains)
        # a round in which the schedule exchanges nothing would take the same correction off once more
        for group in groups if round.plan.sends else ():
            cut = layout.groups[group]
            out[cut] -= share / round.local_steps * state[SHIFT][cut]
        if prox is not None:
            mixed = round.plan.sends if k == round.local_steps - 1 and speaks(round.t) else ()
            prox(out, round, [group for group in groups if group not in mixed])
        return out

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        if round.local_steps < 1:
            raise ValueError(f"wrapper.name = {name!r} needs the number of local steps, got local_steps = {round.local_steps}")
        message, inner = rule.send(state[HALF] if round.exchange else x, state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        own = state[HALF] if round.exchange else x
        once, inner = rule.mix(own, inbox, state, round)
        if round.exchange + 1 < one.exchanges:
            return x.clone(), {**state, **inner, HALF: once}
        out, kept = _combined((x, own, once) if round.exchange else (x, once), state, round)
        return out, {**inner, **kept}

    def _combined(powers: tuple[Tensor, ...], state: State, round: Round) -> tuple[Tensor, State]:
        """From z, W z and W^2 z to the new row and what is kept."""
        groups, out = corrected(layout, round), powers[1].clone()
        dual, shift, begun = (state[key].clone() for key in (DUAL, SHIFT, BEGUN))
        for group in groups:
            cut, which = layout.groups[group], GROUPS.index(group)
            matrices = one.matrices if one.first is None or begun[which] else one.first
            out[cut], moved, base = (_polynomial(coefficients, powers, cut) for coefficients in matrices)
            dual[cut] += moved
            shift[cut] = dual[cut] if one.combines else dual[cut] + out[cut] - base
            begun[which] = 1
        if prox is not None:
            prox(out, round, groups)
        return out, {DUAL: dual, SHIFT: shift, BEGUN: begun}

    return rule._replace(init=init, send=send, mix=mix, after_step=after_step, speaks=speaks, exchanges=one.exchanges,
                         linear=False, conserves=True, remembers=True,
                         facts={**rule.facts, **({"coin_probability": p} if p < 1 else {})},
                         check=all_of(rule.check, doubly_stochastic(name), _stable(name, one, speaks, share)))


def _polynomial(coefficients: tuple[float, ...], powers: tuple[Tensor, ...], cut: slice) -> Tensor:
    total = None
    for coefficient, power in zip(coefficients, powers, strict=False):
        if coefficient:
            part = power[cut] if coefficient == 1 else power[cut] * coefficient
            total = part if total is None else total + part
    return torch.zeros_like(powers[0][cut]) if total is None else total.clone()


def _stable(name: str, one: Member, speaks: Callable[[int], bool], share: float) -> Callable[[object], None]:
    """ValueError for W(t) under which disagreement grows by itself."""
    def recursion(mix: Mix, t: int, state: np.ndarray) -> np.ndarray:
        x, dual, shift = state
        z = x - share * shift
        if not speaks(t):
            return np.stack([z, dual, shift])
        once = mix(z)
        powers = (z, once, mix(once))
        x, moved, base = (sum(c * power for c, power in zip(coefficients, powers, strict=True)) for coefficients in one.matrices)
        return np.stack([x, dual + moved, dual + moved + x - base])

    def check(topology) -> None:
        factor = growth(topology, recursion, 3)
        if factor > TOLERANCE:
            raise ValueError(f"wrapper.name = {name!r} diverges on topology.name = {name_of(topology)!r}: disagreement grows by "
                             f"{factor:.3f} a round; allowed: a graph that stays the same with symmetric weights, a denser one, a "
                             "larger wrapper.chi, or wrapper: gradient_tracking")
    return check
