"""Frozen A with orthonormal rows, common to all peers: FedSVD."""

import torch
from torch import Tensor

from dfl.adapters.batched import qr
from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import refactor, truncate
from dfl.plugins import check_choice
from dfl.rules.average import average
from dfl.slots import Inbox, Round, Rule, State

FORMS = ("orthonormal", "spectral")


def fed_svd(layout: Layout, *, form: str = "orthonormal") -> Rule:
    """Train and mix B over a frozen common A with orthonormal rows (FedSVD as gossip).

    B_i <- sum_j w_ij B_j (O, R), as `ffa`, after a change of basis that keeps every product B A. A is the same
    everywhere, so the cross term is zero and the mean product is kept. Lee, Park, Lee, Wagner, Seong, Bocklet, Lee,
    Hwang 2025, arXiv 2505.12805. form: orthonormal: A = L Q once, at the end of round 0, A <- Q, B_i <- B_i L. It
    depends on A alone, so all peers do the same, even one that receives nothing; any graph will do. spectral: the published
    server method: every round U S V^T = B A, B <- U S, A <- V^T, V = Q^T A for the eigenbasis Q of B^T B (A
    orthonormal). Peers with different B turn A differently, and what `ffa` keeps is lost: a Gram matrix gossiped once a
    round is not yet common, and where its eigenvalues are close no tolerance helps. So it needs a topology on which all
    peers hold the same B after every mix: complete, with equal weights. Both leave the space spanned by the rows of A
    as it is at the start: B A has no other rows.
    """
    check_choice("rule.form", form, FORMS)
    plain = average(layout)

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if form == "spectral":  # the weights of W are equal up to rounding; here B has to be the same to the bit
            round = round._replace(weights=dict.fromkeys(inbox, 1 / len(inbox)))
        out, state = plain.mix(x, inbox, state, round)
        if form == "spectral" and len(inbox) > 1:
            in_eigenbasis(layout, out)
        if form == "orthonormal" and round.t == 0:
            orthonormalise(layout, out)
        return out, state

    needs = "complete" if form == "spectral" else "any"
    return plain._replace(mix=mix, linear=False, changes_basis=form == "spectral", needs=needs, takes=frozenset({"B"}),
                          averages=form == "orthonormal", dated=True, facts={"form": form})


def orthonormalise(layout: Layout, row: Tensor) -> None:
    """A = L Q becomes Q, B becomes B L, in place. The diagonal of L is positive: an A that is orthonormal stays."""
    for pairs in layout.shapes():
        a, b = stack_a(row, pairs), stack_b(row, pairs)
        q, r = qr(a.double().mT)
        sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r)[..., None, :]
        q, lower = q * sign, r.mT * sign
        write_pairs(row, pairs, q.mT.to(a), (b.double() @ lower).to(b))


def in_eigenbasis(layout: Layout, row: Tensor) -> None:
    """B A = U S V^T: B becomes U S, A becomes V^T, in place; where B is zero both stay."""
    for pairs in layout.shapes():
        a, b = stack_a(row, pairs), stack_b(row, pairs)
        svd = truncate(b, a, pairs[0].rank)
        new_a, new_b = refactor(svd, a, "left")
        alive = (svd.spectrum[:, 0] > 0)[:, None, None]
        write_pairs(row, pairs, torch.where(alive, new_a, a), torch.where(alive, new_b, b))
