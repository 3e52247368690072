"""What rules share: averages over an inbox, groups of a row as parts of a message, checks of parameters."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.slots import Inbox, Message, Round, State

BOTH = frozenset({"A", "B"})


def weighted_mean(values: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """sum_j w_j m_j of tensors by peer, accumulated in ascending peer id: the same bits however peers are hosted."""
    total: Tensor | None = None
    for peer in sorted(values):
        value, weight = values[peer], float(weights[peer])
        total = value * weight if total is None else total.add_(value, alpha=weight)
    assert total is not None, "nobody is in the inbox, not even the peer itself"
    return total


def parts_of(x: Tensor, layout: Layout, groups: Iterable[str]) -> dict[str, Tensor]:
    """The groups that the layout has, as views of row x_D, in row order."""
    return {group: x[layout.groups[group]] for group in layout.present(groups)}


def mean_of_groups(out: Tensor, layout: Layout, groups: Iterable[str], inbox: Inbox, round: Round) -> None:
    """out_F <- sum_j w_ij F_j for the groups F, which are parts of all messages; in place."""
    first, *rest = [(inbox[j].parts, float(round.weights[j])) for j in sorted(inbox)]  # ascending, as `weighted_mean`
    for group in layout.present(groups):
        cut = out[layout.groups[group]]
        torch.mul(first[0][group], first[1], out=cut)
        for parts, weight in rest:
            cut.add_(parts[group], alpha=weight)


class GroupMean:
    """A rule's `mix` that averages the groups which the schedule has exchanged, x_F,i <- sum_j w_ij x_F,j, and does nothing else: so
    `Gossip` may write the sums where they belong (dfl/engine/averaging.py)."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __call__(self, x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        # a whole row that travels is written over
        whole = self.layout.length(round.plan.sends) == self.layout.size
        out = torch.empty_like(x) if whole else x.clone()
        mean_of_groups(out, self.layout, round.plan.sends, inbox, round)
        return out, state


def send_groups(layout: Layout) -> Callable[[Tensor, State, Round], tuple[Message, State]]:
    """A rule's `send` whose message is the groups that the plan has exchanged."""
    @cache
    def columns(groups: frozenset[str]) -> list[tuple[str, slice]]:
        return [(group, layout.groups[group]) for group in layout.present(groups)]

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        return Message({group: x[cut] for group, cut in columns(round.plan.sends)}), state
    return send


def same_shape(message: Message, own: Message, names: Iterable[str] | None = None) -> bool:
    """Whether a message has the parts `names` of the own, as long as they, and the same kinds of metadata; None: all of them."""
    chosen = own.parts if names is None else names
    return (message.parts.keys() == own.parts.keys() and message.meta.keys() == own.meta.keys()
            and all(message.parts[name].shape == own.parts[name].shape for name in chosen))


def no_state(x: Tensor) -> State:
    return {}
