"""What wrappers share: which numbers they correct, how those travel, how far a peer went, what W(t) has to be.

A wrapper corrects the groups that a round trains and exchanges. Groups that stay at home (a personal B, a local head)
are nobody else's business, and in a round that does not train a group what is kept of it waits.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.rules.base import weighted_mean
from dfl.slots import Inbox, Message, Round, Rule, State


def check_rule(name: str, rule: Rule) -> None:
    """ValueError for a rule whose mixed rows are no averages of rows: what wrappers add would not cancel there."""
    if not (rule.linear and rule.averages):
        raise ValueError(f"wrapper.name = {name!r} needs a rule that averages rows as they are, since products and turned "
                         "bases keep no sum of rows; allowed: methods with the rule average (lora, ffa, adf, tad, ...)")


def corrected(layout: Layout, round: Round) -> list[str]:
    """The groups that the round trains and exchanges, in row order."""
    return layout.present(round.plan.trains & round.plan.sends)


def rate(round: Round, group: str) -> float:
    """The learning rate of a group."""
    return round.rates.get(group, round.lr)


def after_correction(x: Tensor, values: Tensor, layout: Layout, round: Round, factor: float = 1.0) -> Tensor:
    """The row x (D,) behind a local step, with factor `values` (D,) added to its gradient in the groups that the round trains."""
    out = x.clone()
    for group in layout.present(round.plan.trains):
        cut = layout.groups[group]
        out[cut] -= rate(round, group) * factor * values[cut]
    return out


def num_steps(name: str, round: Round, state: State, last: str) -> int:
    """The peer's local steps since the exchange of round state[last]: of several rounds where some exchange nothing."""
    if round.local_steps < 1:
        raise ValueError(f"wrapper.name = {name!r} needs the number of local steps, got local_steps = "
                         f"{round.local_steps}")
    return round.local_steps * (round.t - int(state[last]))


def check_rates(name: str, round: Round, groups: Iterable[str]) -> None:
    """ValueError where a group moved and its rate is not known."""
    for group in groups:
        if not rate(round, group) > 0:
            raise ValueError(f"wrapper.name = {name!r} needs the learning rate of what it corrects, got "
                             f"{rate(round, group)} for {group}; allowed: a positive number")


def at_round(t: int) -> Tensor:
    """A round as a state, int64 (1,)."""
    return torch.tensor([t])


def with_parts(message: Message, prefix: str, values: Tensor, layout: Layout, groups: Iterable[str]) -> Message:
    """The message, and beside it the groups of the row `values` (D,) under prefix.group."""
    added = {prefix + group: values[layout.groups[group]] for group in groups}
    return message._replace(parts={**message.parts, **added})


def without_parts(inbox: Inbox, prefix: str) -> Inbox:
    """What the rule itself has sent."""
    def bare(message: Message) -> Message:
        return message._replace(parts={name: part for name, part in message.parts.items() if not name.startswith(prefix)})

    return {j: bare(message) for j, message in inbox.items()}


def mean_of_parts(inbox: Inbox, prefix: str, group: str, round: Round) -> Tensor:
    """sum_j w_ij m_j of the part prefix.group."""
    return weighted_mean({j: message.parts[prefix + group] for j, message in inbox.items()}, round.weights)


def _declared(topology: object, name: str) -> Any:
    return getattr(topology, name, None)


def doubly_stochastic(name: str) -> Callable[[object], None]:
    """ValueError for a topology whose columns, or rows, do not sum to one: what the peers keep would not cancel."""
    def check(topology: Any) -> None:
        sums = _declared(topology, "sums")
        if sums is None:  # a sequence from outside may not tell
            w = np.asarray(topology.matrix(0))
            sums = "doubly" if np.allclose(w.sum(0), 1, rtol=0, atol=1e-9) else "row"
        if sums != "doubly":
            raise ValueError(f"wrapper.name = {name!r} needs W(t) whose rows and columns sum to one, so that what the peers "
                             f"keep cancels over all of them; topology.name = {_declared(topology, 'name')!r} is "
                             f"{sums}-stochastic; allowed: weights that are doubly stochastic (metropolis, ...)")
    return check


def all_of(*checks: Callable[[object], None]) -> Callable[[object], None]:
    def check(topology: object) -> None:
        for one in checks:
            one(topology)
    return check
