"""What lies beside an adapter: low-rank products that are part of the model but neither trained nor, as such, mixed.

A start at the base weight's own directions leaves a constant one, the same at every peer; a rule may keep one of its own.
"""

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted
from dfl.adapters.layout import Layout, a_view, b_view, empty_rows, join, join_rows, make_layout


def with_start(adapted: Adapted, start: str) -> Adapted:
    """A and B at the base weight's own directions (PiSSA: its leading singular ones; OLoRA: the first columns of its QR).

    The base weight stays as it is: what the factors add at first, a constant residual -B A takes off. Nothing else is needed for
    peers to share one start, and an adapter of twice the rank says the same without the constant.
    Meng, Wang, Zhang 2024, arXiv 2404.02948; Buyukakyuz 2024, arXiv 2406.01775.
    """
    if start == "kaiming":
        return adapted
    row, layout = adapted.start.clone(), adapted.layout
    beside = make_layout([(p.name, p.rank, p.d_in, p.d_out, p.scaling) for p in layout.pairs])
    offset = empty_rows(1, beside.size)[0]
    for site, other in zip(adapted.sites, beside.pairs, strict=True):
        weight, rank = site.weight.detach().double().cpu(), min(other.rank, other.d_in, other.d_out)
        if start == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            sign = torch.where(vh.gather(1, vh.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
            root = (s[:rank] / other.scaling).sqrt()
            b, a = u[:, :rank] * sign[:rank].mT * root, (vh * sign)[:rank] * root[:, None]
        else:
            q, r = torch.linalg.qr(weight)
            sign = torch.where(r.diagonal() < 0, -1.0, 1.0)
            b, a = (q * sign)[:, :rank] / other.scaling, (r * sign[:, None])[:rank]
        b_view(row, site.pair)[:, :rank], a_view(row, site.pair)[:rank] = b.float(), a.float()
        b_view(offset, other).copy_(-b_view(row, site.pair))
        a_view(offset, other).copy_(a_view(row, site.pair))
    return adapted._replace(start=row, offset=(beside, offset), residual=beside)


def with_residual(adapted: Adapted, layout: Layout | None) -> Adapted:
    """The same with room for the residual that a rule keeps, behind the constant one."""
    if layout is None:
        return adapted
    return adapted._replace(residual=layout if adapted.offset is None else join((adapted.offset[0], layout)), kept=layout)


def residual_rows(adapted: Adapted, kept: Tensor | None, x: Tensor) -> Tensor | None:
    """All that lies beside the adapters of the rows x (P, D), where they are, (P, D_E): the constant residual and the rule's rows
    `kept` (P, D_kept)."""
    if adapted.residual is None or adapted.offset is None:
        return kept
    layout, constant = adapted.offset[0], adapted.offset[1].to(x.device)
    if kept is None:
        layouts, rows = [layout], [constant]
    else:
        layouts, rows = [layout, adapted.kept], [constant, kept]
    return join_rows(adapted.residual, layouts, rows, len(x))
