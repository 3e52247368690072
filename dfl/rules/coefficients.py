"""Rules that average factors with learned coefficients: FLoRA-NA.

Coefficients p of the B's and q of the A's bring (sum_u p_u B_u)(sum_u q_u A_u) close to sum_j w_j B_j A_j. All of it
happens in Gram tables; a peer needs nothing beyond the factors it receives. Shapes: L layers, J pairs, F free
coefficients; n sets of coefficients, one a layer or one for all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import known
from dfl.adapters.batched import solve as solve_systems
from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import Grams, combined, factor_error, gram_tables, products
from dfl.plugins import check_choice
from dfl.rules.alignment import in_own_frame
from dfl.rules.base import BOTH
from dfl.rules.pairs import Received, pair_gossip
from dfl.slots import Round, Rule, State

CHOICES = {"form": ("factor", "delta"), "scope": ("layer", "global"), "solver": ("als", "adamw"), "align": ("none", "own"),
           "gauge": ("norms", "sums")}
STEPS = {"als": 200, "adamw": 200}
# a sweep that takes less than this share of the squared error is the last; so many sweeps decide from where to go on
RIDGE, TOLERANCE, TRIAL = 1e-6, 1e-6, 10
ADAMW_RATE = 1e-2
Coefficients = tuple[Tensor, Tensor]  # p (n, J), q (n, J)


class Fit(NamedTuple):
    """A least-squares problem: the tables of its layers by shape, and coefficients c = base + basis f of which only f is free."""

    grams: list[Grams]
    scales: list[Tensor]  # (L,) what a layer's squared error counts: one over its target
    weights: Tensor  # (J,): the target is sum_j w_j B_j A_j
    base: Tensor  # (J,)
    basis: Tensor  # (J, F)
    start: Tensor  # (F,): plain averaging
    shared: bool  # one set of coefficients for all layers

    def coefficients(self, free: Tensor) -> Tensor:
        return self.base + free @ self.basis.T

    def gather(self, values: list[Tensor]) -> Tensor:
        """Quantities of the layers (L, ...), scaled: each by itself (n = L), or their sum over all (n = 1)."""
        scaled = [v * s.view(-1, *[1] * (v.dim() - 1)) for v, s in zip(values, self.scales, strict=True)]
        return sum(v.sum(0, keepdim=True) for v in scaled) if self.shared else scaled[0]

    def error(self, p: Tensor, q: Tensor) -> Tensor:
        """Relative squared error (n,), a sum where coefficients are shared."""
        return self.gather([factor_error(grams, p, q, self.weights) for grams in self.grams])


def flora_na(layout: Layout, *, form: str = "factor", scope: str = "layer", solver: str = "als", align: str = "none",
             gauge: str = "norms", steps: int | None = None) -> Rule:
    """Average factors with coefficients that bring their product closest to the mean product (FLoRA-NA as gossip).

    min over p, q of ||(sum_u p_u B_u)(sum_u q_u A_u) - sum_j w_ij B_j A_j||_F²;  B_i <- sum_u p_u B_u;  A_i <- sum_u q_u A_u. Never
    worse than plain averaging; neither the mean factors nor the mean product are kept. Where pairs stand in different frames it picks
    one peer: `largest_coefficient` (J max |p_u|) above 3 says so, and align = own, which turns them first, helps.
    Nguyen, Nguyen, Jeong, Le, Pham 2025, arXiv 2509.26399.
    form: factor, as published; delta scales what changed since the peer's last mix instead. scope: coefficients of each layer, or
    global ones, every layer measured by its own target. solver: als, alternating least squares of at most `steps` (200) sweeps, from
    the best of plain averaging and of each peer alone after ten sweeps of each, as there is more than one minimum; or adamw, the
    authors' development code (with form delta and scope global): AdamW from plain averaging, 200 steps, the best kept.
    gauge: p c and q / c are as good: norms makes both mean factors equally long (not while B = 0), sums the sums of p and q.
    """
    chosen = {"form": form, "scope": scope, "solver": solver, "align": align, "gauge": gauge}
    for field, value in chosen.items():
        check_choice(f"rule.{field}", value, CHOICES[field])
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"rule.steps = {steps!r} is not allowed; allowed: a whole number from 1")
    num_steps = STEPS[solver] if steps is None else steps
    delta, shapes, num_factors = form == "delta", layout.shapes(), layout.length(BOTH)

    def combine(out: Tensor, received: Received, state: State) -> State:
        rows = in_own_frame(layout, received, out, "A") if align == "own" else received.rows
        if delta:
            rows = torch.cat([rows, state["start"][None]])
        factors = [(stack_a(rows, pairs), stack_b(rows, pairs)) for pairs in shapes]
        fits = problems(factors, received.weights, delta, scope == "global")
        solved = [solve(fit, solver, num_steps, None if delta else gauge) for fit in fits]
        each = solved if scope == "layer" else solved * len(shapes)
        for pairs, (a, b), (p, q) in zip(shapes, factors, each, strict=True):
            write_pairs(out, pairs, torch.einsum("lu,ulri->lri", q.to(a).expand(len(pairs), -1), a),
                        torch.einsum("lu,ulor->lor", p.to(b).expand(len(pairs), -1), b))
        errors = torch.cat([fit.error(p, q) for fit, (p, q) in zip(fits, solved, strict=True)])
        largest = torch.stack([p[:, :len(received.peers)].abs().max() for p, _ in solved]).max() * len(received.peers)
        return {**state, "relative_error": (errors.sum() / len(layout.pairs)).sqrt(), "largest_coefficient": largest}

    def remember(x: Tensor) -> State:
        return {"start": x[:num_factors].clone()}

    def finalize(out: Tensor, state: State, round: Round) -> State:
        return {**state, **remember(out)}

    return pair_gossip(layout, combine, init=remember if delta else (lambda x: {}), finalize=finalize if delta else None,
                       diagnostics=("relative_error", "largest_coefficient"), changes_basis=False, of_rows=not delta,
                       facts={**chosen, "steps": num_steps})


def problems(factors: list[tuple[Tensor, Tensor]], weights: Tensor, delta: bool, shared: bool) -> list[Fit]:
    """What is to be solved for the factors of each shape: one problem a shape, or one for all.

    factors: A (J, L, R, I) and B (J, L, O, R); with `delta` the last pair is that from which the others started, whose
    coefficient is one minus the sum of the others, so that only the changes are scaled.
    """
    num = len(weights)
    eye = torch.eye(num, dtype=torch.float64, device=weights.device)
    base, basis, target = eye.new_zeros(num), eye, weights
    if delta:
        base = torch.cat([base, base.new_ones(1)])
        basis = torch.cat([eye, -eye.new_ones(1, num)])
        target = torch.cat([weights, weights.new_zeros(1)])
    grams = [gram_tables(a, b) for a, b in factors]
    energy = [torch.einsum("u,lua,a->l", target, products(table), target) for table in grams]
    scales = [torch.where(e > 0, 1 / e, torch.ones_like(e)) for e in energy]
    groups = [(grams, scales)] if shared else [([table], [scale]) for table, scale in zip(grams, scales, strict=True)]
    return [Fit(*group, target, base, basis, weights, shared) for group in groups]


def solve(fit: Fit, solver: str, steps: int, gauge: str | None) -> Coefficients:
    """p and q (n, J), in the gauge asked for; those of plain averaging where they are not better."""
    num = 1 if fit.shared else len(fit.scales[0])
    start = fit.start.expand(num, -1)
    p, q = {"als": als, "adamw": adamw}[solver](fit, start, steps)
    if gauge is not None:
        p, q = in_gauge(fit, p, q, gauge)
    plain = fit.coefficients(start)
    better = (fit.error(p, q) <= fit.error(plain, plain))[:, None]
    return torch.where(better, p, plain), torch.where(better, q, plain)


def als(fit: Fit, start: Tensor, steps: int) -> Coefficients:
    """Alternating least squares: each half step is an F x F system, a ridge toward plain averaging keeps it regular.

    From plain averaging and from each of the F coefficients alone; after TRIAL sweeps each set goes on from what is best for it.
    Those alone come by their error, not by their place, so that the numbers of the peers decide nothing where two are as good.
    """
    alone = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    errors = torch.stack([fit.error(*(fit.coefficients(one.expand_as(start)),) * 2) for one in alone], -1)
    p, q, least = _sweeps(fit, start, start, min(steps, TRIAL))
    for first in alone[errors.argsort(dim=-1, stable=True)].unbind(1):
        other_p, other_q, error = _sweeps(fit, start, first, min(steps, TRIAL))
        better = (error < (1 - TOLERANCE) * least)[:, None]
        p, q, least = torch.where(better, other_p, p), torch.where(better, other_q, q), torch.minimum(error, least)
    p, q, _ = _sweeps(fit, start, None, steps - TRIAL, (p, q))
    return p, q


def _sweeps(fit: Fit, start: Tensor, first: Tensor | None, steps: int, found: Coefficients | None = None) -> tuple[Tensor, ...]:
    """p, q and their error after at most `steps` sweeps from free coefficients `first`, or from what was `found` before."""
    p, q = found or (fit.coefficients(first),) * 2
    before = fit.error(p, q)
    for _ in range(steps):
        p = _half_step(fit, start, q, "b")
        q = _half_step(fit, start, p, "a")
        error = fit.error(p, q)
        if known((before - error <= TOLERANCE * before).all()):
            return p, q, error
        before = error
    return p, q, before


def _half_step(fit: Fit, start: Tensor, other: Tensor, mine: str) -> Tensor:
    """The best coefficients (n, J) of one factor for those of the other."""
    systems = [_normal(*((g.b, g.a) if mine == "b" else (g.a, g.b)), fit.weights, other) for g in fit.grams]
    h, c = (fit.gather([system[k] for system in systems]) for k in (0, 1))
    c = ((c - h @ fit.base)[:, None] @ fit.basis)[:, 0]
    h = fit.basis.T @ h @ fit.basis
    trace = h.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None]
    ridge = torch.where(trace > 0, RIDGE * trace / h.shape[-1], torch.ones_like(trace))
    return fit.coefficients(solve_systems(h + torch.diag_embed(ridge.expand_as(c)), c + ridge * start))


def _normal(mine: Tensor, theirs: Tensor, weights: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """H (L, J, J) and c (L, J): the error is c^T H c - 2 c^T c + const in the coefficients of `mine`."""
    h = torch.einsum("luxay,lxy->lua", mine, combined(theirs, other).expand(len(mine), -1, -1))
    half = torch.einsum("...v,...vxay->...axy", other, theirs)
    return h, torch.einsum("a,luxay,laxy->lu", weights, mine, half)


def adamw(fit: Fit, start: Tensor, steps: int) -> Coefficients:
    """AdamW on factors of the weights, from ones; the best coefficients seen."""
    best = plain = fit.coefficients(start)
    best_p, best_q, least = plain, best, fit.error(plain, plain)
    with torch.enable_grad():
        scales = [torch.ones_like(start).requires_grad_() for _ in range(2)]
        optimizer = torch.optim.AdamW(scales, lr=ADAMW_RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            fit.error(*(fit.coefficients(start * scale) for scale in scales)).sum().backward()
            optimizer.step()
            p, q = (fit.coefficients(start * scale).detach() for scale in scales)
            error = fit.error(p, q)
            better = (error < least)[:, None]
            best_p, best_q = torch.where(better, p, best_p), torch.where(better, q, best_q)
            least = torch.minimum(error, least)
    return best_p, best_q


def in_gauge(fit: Fit, p: Tensor, q: Tensor, gauge: str) -> Coefficients:
    """p / g and q g with the g that makes both equal: the norms of the mean factors, or the sums of the coefficients."""
    if gauge == "sums":
        of_p, of_q = p.sum(-1).abs(), q.sum(-1).abs()
    else:
        of_p, of_q = (_length(fit, [table[k] for table in fit.grams], c) for k, c in ((0, p), (1, q)))
    ratio = torch.where((of_p > 0) & (of_q > 0), of_p / of_q, torch.ones_like(of_p))
    g = ratio.sqrt()[:, None]
    return p / g, q * g


def _length(fit: Fit, tables: list[Tensor], c: Tensor) -> Tensor:
    """||sum_u c_u F_u|| (n,) of one factor: of each layer, or of all together."""
    squares = [combined(table, c).diagonal(dim1=-2, dim2=-1).sum(-1) for table in tables]
    return (sum(s.sum(0, keepdim=True) for s in squares) if fit.shared else squares[0]).clamp_min(0).sqrt()
