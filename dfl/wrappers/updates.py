"""Messages of what a local phase changed, where plain averaging sends where it led."""

from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import check_rule

START = "updates.start"


def updates(rule: Rule, *, layout: Layout) -> Rule:
    """Exchange what local steps changed and not where they led (gradients, or FedAvg in differences); complete graph only.

    u_i = x_i after the local phase - s_i, s_i = x_i at the round's start; x_i <- s_i + sum_j w_ij u_j, for the groups that
    are exchanged. All (D,); with one local step of plain descent u_i = -lr g_i. Peers that start from one row, with equal
    weights of all, keep one row: it is the rule as it is, to rounding, and the network mean moves by the mean step alone.
    What a codec makes of u_i takes its place at i as well, so that rows stay one and the mean moves by the mean of those.
    Messages are as small as steps, so that errors in proportion to a message (codecs, noise on the way) vanish with the
    learning rate where those of models stay: the gradient payload of `over_the_air`. Nothing pulls rows together that
    differ: what is lost or noisy at one receiver alone stays between them, and other graphs than the complete one are
    refused. One message, as without. McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, arXiv 1602.05629; on the
    payload: Zhu, Shi, Zhou, Jiang, Chen, Letaief 2023, arXiv 2310.10089.
    """
    check_rule("updates", rule)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone()}

    def change(x: Tensor, state: State, round: Round) -> Tensor:
        out = x.clone()
        for cut in layout.columns(round.plan.sends):
            out[cut] -= state[START][cut]
        return out

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(change(x, state, round), state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(change(x, state, round), inbox, state, round)
        for cut in layout.columns(round.plan.sends):
            out[cut] += state[START][cut]
        return out, {**inner, START: out.clone()}

    return rule._replace(init=init, send=send, mix=mix, of_rows=False, dated=True, needs="complete", updates=True)
