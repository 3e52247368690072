"""How far messages are from each other: as numbers, or as the products that their factors make."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, scalings, stack_a, stack_b
from dfl.adapters.lowrank import gram_tables, products
from dfl.slots import Inbox

METRICS = ("factors", "product")
FACTORS = ("A", "B")


def inner_products(inbox: Inbox, own: int, x: Tensor, layout: Layout | None, metric: str) -> Tensor:
    """<m_a - m_own, m_b - m_own> of J messages in ascending id, (J, J) float64: the own row and column are zero.

    factors: over all numbers. product: of sum_l s_l² <B A, B' A'>, from Gram matrices of J R x J R, and of all that is neither A nor B
    as numbers; a factor that does not travel is that of the receiver's row x (D,).
    """
    peers, others = sorted(inbox), inbox[own].parts
    total = torch.zeros(len(peers), len(peers), dtype=torch.float64, device=x.device)
    compared = layout if metric == "product" and any(name in others for name in FACTORS) else None
    by_product = compared is not None and compared.has("A")
    for name in others:
        if not (by_product and name in FACTORS):
            rows = torch.stack([inbox[j].parts[name] - others[name] for j in peers]).double()
            total = total + rows @ rows.mT
    if compared is not None and by_product:
        rows = torch.stack([with_parts(x, inbox[j].parts, compared) for j in peers])
        for pairs in compared.shapes():
            found = products(gram_tables(stack_a(rows, pairs), stack_b(rows, pairs)))
            found = (found * scalings(pairs, x).square()[:, None, None]).sum(0)
            k = peers.index(own)
            total = total + found - found[:, k:k + 1] - found[k:k + 1] + found[k, k]
    return total


def with_parts(x: Tensor, parts: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The row (D,) with the factors of a message in place of its own."""
    row = x.clone()
    for name in FACTORS:
        if name in parts:
            row[layout.groups[name]] = parts[name]
    return row


def squared_distances(inner: Tensor) -> Tensor:
    """(J, J) of inner products."""
    squares = inner.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * inner).clamp_min(0)
