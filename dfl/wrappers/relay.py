"""RelaySGD on trees: models are passed on until they have reached everybody, and no mixing matrix is needed."""

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import all_of, check_rule
from dfl.wrappers.stability import name_of

START, COUNT = "relay.start", "relay.count"


def relay(rule: Rule, *, layout: Layout, topology: object | None = None) -> Rule:
    """Pass models on along a tree until each has reached everybody once (RelaySGD).

    y_i = x_i after the local steps; from i to its neighbour j goes m_ij = y_i + sum_{k != j} m_ki, of what came last,
    and how many models are in it, c_ij = 1 + sum_{k != j} c_ki;  x_i <- (y_i + sum_k m_ki + (N - c_i) x_start) / N, c_i
    = 1 + sum_k c_ki. All (D,). Every model is counted once, each as old as its way is long: from `diameter` rounds on
    c_i = N, and the fixed point is the optimum of all, however unequal the data. The weights of W are not used. Peer i
    sends all of it at once, S_i = y_i + sum_k m_ki, from which j takes off what i has from j: one message as long as
    without, and two vectors for each neighbour to remember. Both ends have to agree on these, so that no message may be
    lost, held back or rejected. Needs a tree that stays (path, star, tree, binomial_tree, random_tree). Vogels, He,
    Koloskova et al. 2021, arXiv 2110.04175.
    """
    check_rule("relay", rule)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone()}

    def total(x: Tensor, state: State) -> Tensor:
        """S: the row and all that came last."""
        for name in sorted(state):
            if name.startswith("relay.in."):
                x = x + state[name]
        return x

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(total(x, state), state, round)
        count = 1 + sum(int(value) for name, value in state.items() if name.startswith("relay.known."))
        return message._replace(meta={**message.meta, COUNT: torch.tensor([count])}), {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        sends, kept, own = round.plan.sends, {START: state[START]}, _row(inbox[round.peer], x, layout, round)
        received, count = torch.zeros_like(x), 1
        for j in sorted(inbox):
            if j == round.peer:
                continue
            # what i has from j, and what j has from i, as both of them know it
            before, told = (state.get(f"relay.{way}.{j}", torch.zeros_like(x)) for way in ("in", "out"))
            known, said = (int(state.get(f"relay.{way}.{j}", 0)) for way in ("known", "said"))
            kept[f"relay.in.{j}"] = _row(inbox[j], x, layout, round) - told
            kept[f"relay.out.{j}"] = own - before
            kept[f"relay.known.{j}"] = inbox[j].meta[COUNT] - said
            kept[f"relay.said.{j}"] = inbox[round.peer].meta[COUNT] - known
            received, count = received + kept[f"relay.in.{j}"], count + int(kept[f"relay.known.{j}"])
        out, num = x.clone(), topology.num_peers
        for cut in layout.columns(sends):
            out[cut] = (x[cut] + received[cut] + (num - count) * state[START][cut]) / num
        return out, {**{name: value for name, value in state.items() if not name.startswith("relay.")}, **kept}

    return rule._replace(init=init, send=send, mix=mix, linear=False, averages=False, lossless=True,
                         takes=rule.takes - {"active"}, check=all_of(rule.check, check_tree))


def _row(message: Message, like: Tensor, layout: Layout, round: Round) -> Tensor:
    """The groups of a message in a row (D,), zeros elsewhere."""
    row = torch.zeros_like(like)
    for group in layout.present(round.plan.sends):
        row[layout.groups[group]] = message.parts[group]
    return row


def check_tree(topology) -> None:
    """ValueError for a topology that is no tree, or not the same in every round."""
    name = name_of(topology)
    if getattr(topology, "period", None) != 1:
        raise ValueError(f"wrapper.name = 'relay' needs a tree that is the same in every round, got topology.name = {name!r}; "
                         "allowed: path, star, tree, binomial_tree, random_tree")
    links = np.asarray(topology.matrix(0)) != 0
    np.fill_diagonal(links, False)
    if not (links == links.T).all() or links.sum() != 2 * (len(links) - 1):
        raise ValueError(f"wrapper.name = 'relay' needs a tree of {len(links) - 1} links that go both ways, but topology.name = "
                         f"{name!r} has {int(links.sum())} directed links; allowed: path, star, tree, binomial_tree, random_tree")
