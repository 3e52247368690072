"""What to broadcast, products or factors: the two ends of the aggregation-broadcast family, with its mismatch measures.

For the pair (P, Q) that a peer ends with, over its neighbourhood and all layers, products scaled as ΔW is, from Gram tables alone:
R_weak = max_j ||P Q - B_j A_j||, R_strong = mean_j (||P - B_j||² + ||Q - A_j||²). The first bounds the convergence of the
peers' own models, the second that of the mixed one.
"""

import torch
from torch import Tensor

from dfl.factors import Layout, scalings, stack_a, stack_b
from dfl.lowrank import gram_tables, inner, products
from dfl.rules.base import BOTH, Rule, State, weighted_mean, write_groups
from dfl.rules.pairs import Heard, pair_gossip
from dfl.rules.products import check_split, mix_products

DIAGNOSTICS = ("R_weak", "R_strong", "aggregation_error_relative", "largest_factor")


def sp(layout: Layout, *, split: str = "balanced", head: str = "frozen") -> Rule:
    """Sum of products: mix products and factor the result again, and measure both mismatches (SP, the weak condition).

    P_i Q_i <- best rank-R part of Z = sum_j w_ij B_j A_j, as `decaf`: the mean of the squared product mismatches is least at Z.
    R_strong is not controlled, for an SVD turns the factors. Chen, Chen, Tavallaie, Tran, Xiang, Zomaya 2025, arXiv 2508.01348.
    """
    check_split(split)

    def combine(out: Tensor, heard: Heard, state: State) -> State:
        for pairs in layout.shapes():
            mix_products(out, heard, pairs, split, pairs[0].rank)
        return mismatches(layout, out, heard)

    return pair_gossip(layout, combine, head=head, diagnostics=DIAGNOSTICS, averages=True, facts={"split": split})


def ps(layout: Layout, *, head: str = "frozen") -> Rule:
    """Product of sums: mix factors, as plain LoRA gossip does, and measure both mismatches (PS, the strong condition).

    P_i <- sum_j w_ij B_j (O, R);  Q_i <- sum_j w_ij A_j (R, I), the bits of `lora`. R_strong is least here (equal weights); R_weak
    holds the cross term. Chen, Chen, Tavallaie, Tran, Xiang, Zomaya 2025, arXiv 2508.01348.
    """
    cuts = layout.columns(BOTH)

    def combine(out: Tensor, heard: Heard, state: State) -> State:
        write_groups(out, cuts, weighted_mean(dict(zip(heard.peers, heard.rows, strict=True)), heard.round.weights))
        return mismatches(layout, out, heard)

    return pair_gossip(layout, combine, head=head, diagnostics=DIAGNOSTICS, linear=True, product=False, changes_basis=False,
                       averages=True)


def mismatches(layout: Layout, out: Tensor, heard: Heard) -> State:
    """How far the pairs in row `out` are from those heard, by DIAGNOSTICS."""
    num = len(heard.peers)
    of_products = of_factors = torch.zeros(num + 1, num + 1, dtype=torch.float64, device=out.device)
    largest = of_products.new_zeros(())
    for pairs in layout.shapes():
        a, b = heard.factors(pairs)
        grams = gram_tables(torch.cat([a, stack_a(out, pairs)[None]]), torch.cat([b, stack_b(out, pairs)[None]]))
        of_products = of_products + torch.einsum("l,luv->uv", scalings(pairs, out).square(), products(grams))
        in_b, in_a = inner(grams.b), inner(grams.a)
        of_factors = of_factors + (in_b + in_a).sum(0)
        largest = torch.stack([largest, in_b.max(), in_a.max()]).max()  # the largest inner product is a squared norm
    weighted = torch.cat([heard.weights, -heard.weights.new_ones(1)])
    target = (heard.weights @ of_products[:-1, :-1] @ heard.weights).sqrt()
    error = (weighted @ of_products @ weighted).clamp_min(0).sqrt()
    return {"R_weak": _to_last(of_products).max().sqrt(), "R_strong": _to_last(of_factors).mean(),
            "aggregation_error_relative": torch.where(target > 0, error / target, torch.zeros_like(error)),
            "largest_factor": largest.sqrt()}


def _to_last(table: Tensor) -> Tensor:
    """||x_j - x_J||² (J,) from the inner products (J + 1, J + 1) of x_0 ... x_J."""
    squares = table.diagonal()
    return (squares[:-1] - 2 * table[:-1, -1] + squares[-1]).clamp_min(0)
