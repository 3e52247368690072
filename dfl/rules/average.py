"""Averages of what is trained, group by group: the rule of plain, frozen-A, alternating and core gossip, by its schedule."""

from torch import Tensor

from dfl.adapters.cores import fold_scales
from dfl.adapters.layout import Layout
from dfl.rules.base import GroupMean, no_state, send_groups
from dfl.slots import Inbox, Message, Round, Rule, State


def average(layout: Layout) -> Rule:
    """Average the groups that the schedule has exchanged.

    x_F,i <- sum_j w_ij x_F,j for the groups F in plan.sends, the others untouched. Keeps their network means for doubly
    stochastic W, not the mean product where A and B both differ. With schedule both: Ghiasvand, Alizadeh, Pedarsani
    2025, arXiv 2501.15361 (Dec-LoRA); frozen_a: Sun, Li, Li, Ding 2024, arXiv 2403.12313 (FFA-LoRA); share_a: Guo et
    al. 2025, arXiv 2410.01463 (FedSA-LoRA); alternate: Wang, Li, Zhou, Li, Liu 2025, arXiv 2511.18291 (ADF-LoRA) and
    2026, arXiv 2602.00451 (TAD-LoRA); on cores it is exact for any W: Ponkshe et al. 2025, arXiv 2502.15436 (Fed-SB).
    """
    return Rule(no_state, send_groups(layout), GroupMean(layout), linear=True, averages=True)


def ravan(layout: Layout) -> Rule:
    """Average the products of scales and heads between frozen bases (RAVAN); needs lora.adapter ravan.

    The change of a weight is sum_h s_h B_h H_h A_h.  H_ih <- sum_j w_ij s_jh H_jh (heads, r, r);  s_ih <- 1. Exact for
    any W. Raje et al. 2025, arXiv 2506.05568.
    """
    plain = average(layout)

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        return plain.send(fold_scales(layout, x), state, round)

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if len(inbox) == 1:
            return x.clone(), state
        return plain.mix(x, inbox, state, round)

    return plain._replace(send=send, mix=mix, linear=False, takes=frozenset({"core"}))
