"""Rules for adapters whose factors are frozen bases around a trained core: only the core travels, and averaging it is exact."""

from torch import Tensor

from dfl.factors import Layout, head_view
from dfl.rules.base import Inbox, Round, Rule, State, factor_gossip

CORE = frozenset({"core"})


def fed_sb(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train and mix only the core R of B R A, with B and A frozen and common (Fed-SB); needs lora.adapter sb.

    R_i <- sum_j w_ij R_j (R, R). Linear in the product, so exact for any W; R² numbers a layer, whatever the layer's size. What they
    can reach is what the bases span: seeded ones by default, with lora.start gradient those of the first gradient, as in the paper.
    Ponkshe et al. 2025, arXiv 2502.15436.
    """
    return factor_gossip(layout, lambda t: CORE, lambda t: CORE, head=head)


def ravan(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train heads s_h H_h between frozen bases and mix their products (RAVAN); needs lora.adapter ravan.

    The change of a weight is sum_h s_h B_h H_h A_h.  H_ih <- sum_j w_ij s_jh H_jh (heads, r, r);  s_ih <- 1. Exact for any W.
    Raje et al. 2025, arXiv 2506.05568.
    """
    plain = factor_gossip(layout, lambda t: CORE, lambda t: CORE, head=head)

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        return plain.send(fold(layout, x), state, round)

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if len(inbox) == 1:
            return x.clone(), state
        return plain.mix(x, inbox, state, round)

    return plain._replace(send=send, mix=mix, linear=False)


def fold(layout: Layout, x: Tensor) -> Tensor:
    """The same adapters with all scales one: a copy of the rows x (..., D), in which products are linear."""
    x = x.clone()
    # cores and scales lie in turn
    for cores, scales in zip(layout.cores[::2], layout.cores[1::2], strict=True):
        head_view(x, cores).mul_(head_view(x, scales)[..., None, None])
        head_view(x, scales).fill_(1.0)
    return x
