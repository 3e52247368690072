"""Rules that mix factors every round: plain LoRA gossip, frozen A, A alone, and no mixing at all."""

from dfl.factors import Layout
from dfl.rules.base import BOTH, Rule, factor_gossip

ONLY_A = frozenset({"A"})
ONLY_B = frozenset({"B"})
NOTHING: frozenset[str] = frozenset()


def lora(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train A and B, mix A and B (Dec-LoRA, DLoRA).

    A_i <- sum_j w_ij A_j (R, I);  B_i <- sum_j w_ij B_j (O, R). Keeps the network means of A and of B; not the mean
    product. Ghiasvand, Alizadeh, Pedarsani 2025, arXiv 2501.15361; Saadati et al. 2025, arXiv 2505.21382.
    """
    return factor_gossip(layout, lambda t: BOTH, lambda t: BOTH, head=head)


def ffa(layout: Layout, *, head: str = "frozen") -> Rule:
    """Freeze the shared A, train and mix B (FFA-LoRA as gossip: DLoRA-FA, ConLoRA).

    B_i <- sum_j w_ij B_j (O, R). A is the same everywhere for ever, so the cross term is zero for any W and half
    the bytes travel. Sun, Li, Li, Ding 2024, arXiv 2403.12313; Saadati et al. 2025, arXiv 2505.21382.
    """
    return factor_gossip(layout, lambda t: ONLY_B, lambda t: ONLY_B, head=head, common=frozenset({"A"}))


def share_a(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train A and B, mix A alone: every peer keeps a B of its own (FedSA-LoRA as gossip).

    A_i <- sum_j w_ij A_j (R, I);  B_i stays. Keeps the network mean of A; half the bytes of `lora`. The models are personal:
    judge each peer's own, not a consensus, and keep a trained head local as the paper does (lora.head: local).
    Guo et al. 2025, arXiv 2410.01463.
    """
    return factor_gossip(layout, lambda t: BOTH, lambda t: ONLY_A, head=head)


def local(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train A and B (or cores) alone, never mix: the baseline that gossip has to beat.

    x_i <- x_i (D). Nothing is sent.
    """
    trained = frozenset({"core"}) if layout.has("core") else BOTH
    return factor_gossip(layout, lambda t: trained, lambda t: NOTHING, head=head)
