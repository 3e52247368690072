"""Rules that need the frozen weights themselves: the exact average of DoRA adapters, and HiRA's products under its own metric."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.batched import known, solve
from dfl.adapters.layout import Layout, Pair, head_view, scalings, stack_a, write_pairs
from dfl.adapters.lowrank import refactor, truncate, weighted_sum
from dfl.plugins import check_count
from dfl.rules.pairs import Received, pair_gossip
from dfl.slots import Rule, State

Weights = Mapping[str, Tensor]  # the frozen weight (O, I) of every adapted layer, by its name
# what a sweep of `hira` must at least take off the objective, as a share of what is left, for another to follow
_WORTH = 1e-4


def dora(layout: Layout, *, split: str = "balanced", weights: Weights | None = None) -> Rule:
    """Average the weights that DoRA adapters make, exactly but for truncation to rank R; needs lora.adapter dora.

    W_j = diag(m_j / n_j)(W0 + s B_j A_j), n_j its row norms. With c = sum_j w_j m_j / n_j and omega_j = w_j (m_j / n_j)
    / c by rows, sum_j w_j W_j = diag(c)(W0 + s D), D = sum_j diag(omega_j) B_j A_j;  B A <- best rank-R part of D;  m
    <- c · rownorm(W0 + s D). A DoRA module again; averaging m and the factors apart is not the average of the weights.
    Only W0 A_j^T touches the base, once a round, in the factors' type; the squared norms of W0's rows are taken once
    for all, O numbers a layer. A row whose magnitudes cancel keeps plain weights. After Liu et al. 2024, arXiv
    2402.09353; the closed form is ours.
    """
    squares = {name: weight.detach().double().square().sum(1) for name, weight in (weights or {}).items()}

    def combine(out: Tensor, received: Received, state: State) -> State:
        squared = torch.zeros((), dtype=torch.float64, device=out.device)
        places = {tensor.name: tensor for tensor in layout.magnitudes}
        for pairs in layout.shapes():
            s = scalings(pairs, out)[:, None]
            factors = received.factors(pairs)
            a, b = (x.double() for x in factors)
            base = torch.stack([squares[p.name].to(out.device) for p in pairs])  # (L, O)
            cross = base_times(pairs, weights, factors[0])  # (J, L, O, R)
            in_part = [places[p.name]._replace(offset=places[p.name].offset - layout.groups["M"].start) for p in pairs]
            m = torch.stack([head_view(received.others["M"], place) for place in in_part], 1).double()
            ratio = m / row_norms(base, cross, a, b, s)  # (J, L, O)
            parts = received.weights[:, None, None] * ratio
            c = parts.sum(0)
            # magnitudes of mixed signs may cancel; such a row averages its directions as they are
            cancels = c.abs() < 1e-3 * parts.abs().sum(0)
            omega = torch.where(cancels, received.weights[:, None, None], parts / torch.where(cancels, 1.0, c))
            left, right = weighted_sum(torch.ones_like(received.weights), a, b * omega[..., None])
            svd = truncate(left, right, pairs[0].rank)
            own = stack_a(out, pairs)
            new_a, new_b = refactor(svd, own.double(), split)
            alive = (svd.spectrum[:, 0] > 0)[:, None, None]
            write_pairs(out, pairs, torch.where(alive, new_a, own.double()).to(out), torch.where(alive, new_b, 0.0).to(out))
            new_m = c * row_norms(base, cross.movedim(0, -2).flatten(-2), right, left, s)
            for index, pair in enumerate(pairs):
                head_view(out, places[pair.name]).copy_(new_m[index])
            squared += (svd.error.double() * s[:, 0]).square().sum()
        return {"truncation_error": squared.sqrt()}

    return pair_gossip(layout, combine, diagnostics=("truncation_error",), averages=True, facts={"split": split})


def base_times(pairs: Sequence[Pair], weights: Weights, a: Tensor) -> Tensor:
    """W0 A_j^T for a (J, L, R, I): (J, L, O, R) float64, by one product for each of the L weights (O, I) in the type of `a`."""
    num, rank = a.shape[0], a.shape[-2]
    columns = a.movedim(0, 1).flatten(1, 2).mT  # (L, I, J R)
    products = [weights[pair.name].detach().to(a) @ x for pair, x in zip(pairs, columns, strict=True)]
    return torch.stack(products).double().unflatten(-1, (num, rank)).movedim(-2, 0)


def row_norms(base: Tensor, cross: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Norms of the rows of W0 + s B A: (..., L, O) float64, without an O x I sum.

    base (L, O): the squared norms of the rows of W0; cross = W0 A^T (..., L, O, R); a (..., L, R, I), b (..., L, O, R),
    s (L, 1).
    """
    return (base + 2 * s * (cross * b).sum(-1) + s.square() * ((b @ (a @ a.mT)) * b).sum(-1)).clamp_min(0).sqrt()


def hira(layout: Layout, *, sweeps: int = 5, weights: Weights | None = None) -> Rule:
    """Mix products and cut them to rank R in HiRA's own metric, that of W0 ⊙ (B A); needs lora.adapter hira.

    min over (B, A) of ||W0 ⊙ (B A - sum_j w_ij B_j A_j)||, by alternating least squares from the plain truncation: each
    row of B, and each column of A, solves R x R normal equations weighted by its entries of W0². Never above `decaf`,
    which is optimal only where |W0| is constant. At most `sweeps` times: a layer is done when a sweep takes less than
    1e-4 of the squared error that is left. O(O I R²) a sweep, in float64, with the memory of three float64 weights of
    one layer. Huang et al. 2025 (HiRA, ICLR).
    """
    check_count("rule.sweeps", sweeps, least=0)

    def combine(out: Tensor, received: Received, state: State) -> State:
        for pairs in layout.shapes():
            a, b = received.factors(pairs)
            left, right = weighted_sum(received.weights, a.double(), b.double())
            svd = truncate(left, right, pairs[0].rank)
            own = stack_a(out, pairs).double()
            new_a, new_b = refactor(svd, own, "balanced")
            alive = (svd.spectrum[:, 0] > 0).all()
            for index, pair in enumerate(() if known(~alive) else pairs):
                squares = weights[pair.name].detach().to(out.device).double().square()
                new_a[index], new_b[index] = _fit(squares, left[index], right[index], new_a[index], new_b[index], sweeps)
            new_a = torch.where(alive, new_a, torch.einsum("j,jlri->lri", received.weights, a.double()))
            new_b = torch.where(alive, new_b, torch.einsum("j,jlor->lor", received.weights, b.double()))
            write_pairs(out, pairs, new_a.to(out), new_b.to(out))
        return state

    return pair_gossip(layout, combine, averages=True, facts={"sweeps": sweeps})


def _fit(squares: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Alternating least squares of B A against left @ right with weights `squares` (O, I)."""
    product = left @ right  # as large as the weight, one layer at a time: no sweep needs the long stack again
    target = squares * product
    energy, explained = product.flatten() @ target.flatten(), -torch.inf
    del product
    first, second = torch.triu_indices(len(a), len(a), device=a.device)
    for _ in range(sweeps):
        b = _solve(squares @ (a[first] * a[second]).mT, target @ a.mT)
        # the thin factor on the left: BLAS is several times slower on (O, I)^T times a thin matrix
        wanted = (b.mT @ target).mT
        a = _solve(((b[:, first] * b[:, second]).mT @ squares).mT, wanted).mT
        before, explained = explained, (wanted * a.mT).sum()  # at the optimum over A the squared error is energy - explained
        if known(explained - before < _WORTH * (energy - explained)):
            break
    return a, b


def _solve(upper: Tensor, target: Tensor) -> Tensor:
    """The R x R systems whose upper triangles are `upper` (O, R (R + 1) / 2), row by row, for target (O, R): (O, R)."""
    rank = target.shape[1]
    first, second = torch.triu_indices(rank, rank, device=target.device)
    place = torch.empty(rank, rank, dtype=torch.long, device=target.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=target.device)
    normal = upper[:, place]
    # a whisper of a ridge: a rank that the data do not fill has the smallest solution, not none
    ridge = 1e-13 * normal.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(normal.dtype).tiny)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return solve(normal, target)
