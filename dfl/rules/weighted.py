"""Rules that need the frozen weights themselves: the exact average of DoRA adapters, and HiRA's products under its own metric."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.factors import Layout, Pair, head_view, scalings, stack_a, write_pairs
from dfl.lowrank import refactor, truncate, weighted_sum
from dfl.rules.base import Rule, State, check_count
from dfl.rules.pairs import Heard, pair_gossip

Weights = Mapping[str, Tensor]  # the frozen weight (O, I) of every adapted layer, by its name


def dora(layout: Layout, *, split: str = "balanced", weights: Weights | None = None, head: str = "frozen") -> Rule:
    """Average the weights that DoRA adapters make, exactly but for truncation to rank R; needs lora.adapter dora.

    W_j = diag(m_j / n_j)(W0 + s B_j A_j), n_j its row norms. With c = sum_j w_j m_j / n_j and omega_j = w_j (m_j / n_j) / c by rows,
    sum_j w_j W_j = diag(c)(W0 + s D), D = sum_j diag(omega_j) B_j A_j;  B A <- best rank-R part of D;  m <- c · rownorm(W0 + s D).
    A DoRA module again; averaging m and the factors apart is not the average of the weights. Only W0 A_j^T touches the
    base. A row whose magnitudes cancel keeps plain weights. After Liu et al. 2024, arXiv 2402.09353; the closed form is ours.
    """
    def combine(out: Tensor, heard: Heard, state: State) -> State:
        squared = torch.zeros((), dtype=torch.float64, device=out.device)
        places = {tensor.name: tensor for tensor in layout.magnitudes}
        for pairs in layout.shapes():
            s = scalings(pairs, out)[:, None]
            a, b = (x.double() for x in heard.factors(pairs))
            # in a message the magnitudes come first after A and B
            m = torch.stack([head_view(heard.beside, places[p.name]._replace(offset=places[p.name].offset - layout.groups["M"].start))
                             for p in pairs], 1).double()
            ratio = m / row_norms(pairs, weights, a, b, s)  # (J, L, O)
            parts = heard.weights[:, None, None] * ratio
            c = parts.sum(0)
            # magnitudes of mixed signs may cancel; such a row averages its directions as they are
            cancels = c.abs() < 1e-3 * parts.abs().sum(0)
            omega = torch.where(cancels, heard.weights[:, None, None], parts / torch.where(cancels, 1.0, c))
            left, right = weighted_sum(torch.ones_like(heard.weights), a, b * omega[..., None])
            svd = truncate(left, right, pairs[0].rank)
            own = stack_a(out, pairs)
            new_a, new_b = refactor(svd, own.double(), split)
            alive = (svd.spectrum[:, 0] > 0)[:, None, None]
            write_pairs(out, pairs, torch.where(alive, new_a, own.double()).to(out), torch.where(alive, new_b, 0.0).to(out))
            new_m = c * row_norms(pairs, weights, right, left, s)
            for index, pair in enumerate(pairs):
                head_view(out, places[pair.name]).copy_(new_m[index])
            squared += (svd.error.double() * s[:, 0]).square().sum()
        return {"truncation_error": squared.sqrt()}

    return pair_gossip(layout, combine, head=head, diagnostics=("truncation_error",), facts={"split": split})


def row_norms(pairs: Sequence[Pair], weights: Weights, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Norms of the rows of W0 + s B A for a (..., L, R, I), b (..., L, O, R), s (L, 1): (..., L, O) float64; no O x I sum."""
    bases = [weights[pair.name].detach().to(a.device) for pair in pairs]
    squares = torch.stack([w.double().square().sum(1) for w in bases])
    cross = torch.stack([w.double() @ a[..., k, :, :].mT for k, w in enumerate(bases)], -3)  # W0 A^T
    return (squares + 2 * s * (cross * b).sum(-1) + s.square() * ((b @ (a @ a.mT)) * b).sum(-1)).clamp_min(0).sqrt()


def hira(layout: Layout, *, sweeps: int = 5, weights: Weights | None = None, head: str = "frozen") -> Rule:
    """Mix products and cut them to rank R in HiRA's own metric, the change of the weight W0 ⊙ (B A); needs lora.adapter hira.

    min over (B, A) of ||W0 ⊙ (B A - sum_j w_ij B_j A_j)||, by alternating least squares from the plain truncation: each row of B, and
    each column of A, solves R x R normal equations weighted by its entries of W0². Never above `decaf`, which is optimal only where
    |W0| is constant. O(O I R²) a sweep. Huang et al. 2025 (HiRA, ICLR).
    """
    check_count("rule.sweeps", sweeps, least=0)

    def combine(out: Tensor, heard: Heard, state: State) -> State:
        for pairs in layout.shapes():
            a, b = heard.factors(pairs)
            left, right = weighted_sum(heard.weights, a.double(), b.double())
            svd = truncate(left, right, pairs[0].rank)
            own = stack_a(out, pairs).double()
            new_a, new_b = refactor(svd, own, "balanced")
            if not (svd.spectrum[:, 0] > 0).all():
                new_a = torch.einsum("j,jlri->lri", heard.weights, a.double())
                new_b = torch.einsum("j,jlor->lor", heard.weights, b.double())
            else:
                for index, pair in enumerate(pairs):
                    squares = weights[pair.name].detach().to(out.device).double().square()
                    new_a[index], new_b[index] = _fit(squares, left[index], right[index], new_a[index], new_b[index], sweeps)
            write_pairs(out, pairs, new_a.to(out), new_b.to(out))
        return state

    return pair_gossip(layout, combine, head=head, facts={"sweeps": sweeps})


def _fit(squares: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Alternating least squares of B A against left @ right with weights `squares` (O, I)."""
    for _ in range(sweeps):
        b = _solve(squares, a, left, right)
        a = _solve(squares.mT, b.mT, right.mT, left.mT).mT
    return a, b


def _solve(squares: Tensor, a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows b_o that minimise sum_i squares_oi (b_o · a_i - left_o · right_i)²: a (R, I), left (O, M), right (M, I) -> (O, R)."""
    rank, inner = len(a), len(right)
    normal = (squares @ (a[:, None] * a[None]).flatten(0, 1).mT).unflatten(1, (rank, rank))
    target = torch.einsum("orm,om->or", (squares @ (a[:, None] * right[None]).flatten(0, 1).mT).unflatten(1, (rank, inner)), left)
    # a whisper of a ridge: a rank that the data do not fill has the smallest solution, not none
    ridge = 1e-13 * normal.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(normal.dtype).tiny)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return torch.linalg.solve(normal, target)
