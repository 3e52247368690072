"""Rules that lose nothing: what a rank-R adapter cannot hold stays beside it as a low-rank residual E, part of the model.

Peer i's model is W0 + s (E_i + B_i A_i). E_i = F_i G_i is a row of a layout of its own, never a d x k matrix; its rank is capped,
and what the cap cuts is in the state as `truncation_error`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, Pair, a_view, b_view, empty_rows, join, make_layout, scalings, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import Truncated, cut, refactor, truncate, weighted_sum
from dfl.rules.base import BOTH
from dfl.rules.pairs import Received, pair_gossip, write_slots
from dfl.rules.products import check_split
from dfl.seeds import derive
from dfl.slots import Round, Rule, State

Product = tuple[Tensor, Tensor]  # left (L, O, M) and right (L, M, I)
DIAGNOSTICS = ("truncation_error",)


def fedhl(layout: Layout, *, residual_rank: int | None = None, split: str = "balanced", drift_power: int = 0, eps: float = 1e-6,
          forward: bool = True, ranks: Sequence[int] | None = None) -> Rule:
    """Average whole models and add what each peer has learnt in the ranks that it can train (FedHL as gossip).

    X_i <- sum_j w_ij X_j + sum_j p_ij (B_j A_j - T_j), T_j = best rank-R_j part of X_j, from which peer j started its local phase;
    B_i A_i <- best rank-R_i part of X_i, E_i <- the rest. With the complete graph this is FedHL's server, X + sum_j p_j (B_j A_j
    - T_j), for any ranks; elsewhere the models agree as fast as W mixes. With p = w it is X_i <- sum_j w_ij (E_j + B_j A_j), and
    doubly stochastic W keeps the mean: a message holds the pair and the residual, R_j + rank(E_j) slots, where `carry` takes
    max_j R_j. Other weights need T_j as well, R_j slots more.
    drift_power: 0 takes p_ij = w_ij; 1 or 2 weighs peer j's progress by w_ij / (e_j^power + eps), e_j its own relative tail energy
    (2 is the paper's), which gives up the mean: peers of small rank hardly count any more. forward: false trains without E, as the
    paper starts its clients. Peng, Zeng, Li, Li, Chen, Wang 2025, arXiv 2505.18494.
    """
    check_split(split)
    if drift_power not in (0, 1, 2):
        raise ValueError(f"rule.drift_power = {drift_power!r} is not allowed; allowed: 0, 1, 2")
    beside = residual_layout(layout, residual_rank)
    pairs_sent = 2 if drift_power else 1  # the pair after training, and the one before it
    wire = join([layout] * pairs_sent + [beside])

    def outgoing(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        """[B_j | T_j's | E_j] without gaps."""
        row = empty_rows(1, wire.size, dtype=x.dtype, device=x.device)[0]
        rank = own_rank(layout, ranks, round.peer)
        for place, pair, rest in zip(wire.pairs, layout.pairs, beside.pairs, strict=True):
            parts = [(x, pair, min(pair.rank, rank)), (state["residual"], rest, rest.rank)]
            if drift_power:
                parts.insert(1, (state["start"], pair, min(pair.rank, rank)))
            first = 0
            for source, where, size in parts:
                a_view(row, place)[first:first + size] = a_view(source, where)[:size]
                b_view(row, place)[:, first:first + size] = b_view(source, where)[:, :size]
                first += size
        return row, state

    def message_ranks(state: State, round: Round) -> list[int]:
        used = torch.stack([(a_view(state["residual"], pair) != 0).any(-1).sum() for pair in beside.pairs]).tolist()
        return [pairs_sent * min(pair.rank, own_rank(layout, ranks, round.peer)) + rank
                for pair, rank in zip(layout.pairs, used, strict=True)]

    def combine(out: Tensor, received: Received, state: State) -> State:
        progress = received.weights
        if drift_power:
            progress = progress / (received.notes[:, 0] ** drift_power + eps)
            progress = progress / progress.sum()

        def products(pairs):
            a, b = received.factors(wire.like(pairs))
            shares = received.weights[:, None].repeat(1, b.shape[-1])
            if drift_power:
                for share, j, p in zip(shares, received.peers, progress, strict=True):
                    rank = min(pairs[0].rank, own_rank(layout, ranks, j))
                    share[rank:2 * rank] -= p
                    share[:rank] = p
            return [weighted_sum(torch.ones_like(received.weights), a, b * shares[:, None, None].to(b))]
        return split_model(out, layout, beside, own_rank(layout, ranks, received.round.peer), products, split, tidy=True)

    def init(x: Tensor) -> State:
        return {**no_residual(beside)(x), **(started(x) if drift_power else {})}

    def started(x: Tensor) -> State:
        return {"start": x[:layout.length(BOTH)].clone()}

    def finalize(out: Tensor, state: State, round: Round) -> State:
        return state | started(out)

    return pair_gossip(layout, combine, init=init, outgoing=outgoing, message_ranks=message_ranks, wire=wire,
                       finalize=finalize if drift_power else None, note="tail_energy" if drift_power else None,
                       diagnostics=DIAGNOSTICS,
                       residual=beside if forward else None, averages=not drift_power,
                       facts={"residual_rank": largest_rank(beside), "split": split})


def carry(layout: Layout, *, split: str = "balanced", ranks: Sequence[int] | None = None) -> Rule:
    """Every peer carries the largest rank and trains its own part of it: product mixing without collapse for unequal ranks.

    M_i = sum_j w_ij (E_j + B_j A_j), cut to rank R = max_j R_j; its leading R_i directions are trained as B_i A_i, the others stay
    as E_i, frozen. Every message has rank R; as `decaf` at rank R but for what is trained, so that a peer of small rank cuts nothing
    from what it passes on. The idea of folding what is not trained is that of Fed-PLoRA (`plora`), Zhang, Hu, Xu 2026,
    arXiv 2602.16936.
    """
    check_split(split)
    beside = residual_layout(layout, largest_rank(layout) or None)

    def outgoing(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        """The frozen directions fill the slots that the peer does not train."""
        rank, row = own_rank(layout, ranks, round.peer), x.clone()
        for pair, other in zip(layout.pairs, beside.pairs, strict=True):
            a_view(row, pair)[rank:] = a_view(state["residual"], other)[:pair.rank - rank]
            b_view(row, pair)[:, rank:] = b_view(state["residual"], other)[:, :pair.rank - rank]
        return row, state

    def combine(out: Tensor, received: Received, state: State) -> State:
        def products(pairs):
            return [weighted_sum(received.weights, *received.factors(pairs))]
        return split_model(out, layout, beside, own_rank(layout, ranks, received.round.peer), products, split, largest_rank(layout))

    return pair_gossip(layout, combine, outgoing=outgoing, init=no_residual(beside),
                       diagnostics=DIAGNOSTICS, residual=beside, averages=True, facts={"split": split})


def fedex(layout: Layout, *, residual_rank: int | None = None) -> Rule:
    """Average factors and keep the error of that as a residual: each round is exact at every peer (FedEx-LoRA, local residual).

    A_i <- Abar_i = sum_j w_ij A_j;  B_i <- Bbar_i;  E_i <- E_i + sum_j w_ij (B_j - Bbar_i)(A_j - Abar_i), which is
    sum_j w_ij B_j A_j - Bbar_i Abar_i. Keeps the network mean of E + B A for doubly stochastic W; the residuals are not mixed and
    drift apart (`fedex_choco` mixes them). Singhal, Ponkshe, Vepakomma 2024, arXiv 2410.09432.
    """
    beside = residual_layout(layout, residual_rank)

    def combine(out: Tensor, received: Received, state: State) -> State:
        tally = Tally(out)
        row = empty_rows(1, beside.size, dtype=out.dtype, device=out.device)[0]
        for pairs in layout.shapes():
            others = beside.like(pairs)
            a, b = received.factors(pairs)
            mean_a = torch.einsum("j,jlri->lri", received.weights.to(a), a)
            mean_b = torch.einsum("j,jlor->lor", received.weights.to(b), b)
            write_pairs(out, pairs, mean_a, mean_b)
            deviations = weighted_sum(received.weights, a - mean_a, b - mean_b)
            svd = truncate(*joined([product_of(state["residual"], others), deviations]), others[0].rank)
            write_pairs(row, others, svd.vh, svd.u * svd.s[:, None])
            tally.add(pairs, svd.error, svd.s)
        return state | {"residual": row, **tally.state()}

    return pair_gossip(layout, combine, init=no_residual(beside), diagnostics=DIAGNOSTICS, residual=beside,
                       changes_basis=False, product=False, averages=True, facts={"residual_rank": largest_rank(beside)})


def flora(layout: Layout, *, residual_rank: int = 64, seed: int = 0, ranks: Sequence[int] | None = None) -> Rule:
    """Stack all pairs, merge them into the model and start the adapter anew each round (FLoRA); complete graph only.

    E <- E + sum_j w_j B_j A_j, the stack [w_1 B_1 | ...] [A_1; ...] of rank sum_j R_j, the same at all peers;  B_i <- 0, A_i <- a
    fresh draw of (seed, t). Exact for any ranks until E outgrows `residual_rank`. On any other graph the models would walk apart.
    Wang et al. 2024, arXiv 2409.05976.
    """
    beside = residual_layout(layout, residual_rank)

    def combine(out: Tensor, received: Received, state: State) -> State:
        def products(pairs):
            return [product_of(state["residual"], beside.like(pairs)), weighted_sum(received.weights, *received.factors(pairs))]
        new = split_model(out, layout, beside, 0, products, "left")
        restart(out, layout, own_rank(layout, ranks, received.round.peer), derive(seed, "flora", received.round.t))
        return new

    return pair_gossip(layout, combine, ranks=ranks, init=no_residual(beside), diagnostics=DIAGNOSTICS,
                       residual=beside, needs="complete", dated=True, facts={"residual_rank": largest_rank(beside)})


def fedex_choco(layout: Layout, *, gamma: float = 0.3, residual_rank: int | None = None, split: str = "balanced",
                ranks: Sequence[int] | None = None) -> Rule:
    """Consensus on whole models with rank-R messages: compressed differences to public copies (CHOCO-Gossip on E + B A).

    X_i = E_i + B_i A_i;  q_i = best rank-R_i part of X_i - H_i, sent;  all holders H_j <- H_j + q_j;  X_i <- X_i + gamma sum_j w_ij
    (H_j - H_i);  B_i A_i <- best rank-R_i part of X_i, E_i the rest. Keeps the network mean of X and reaches consensus on it, of
    any rank: the decentralised form of exact aggregation. Static W, no message may be lost; gamma >= 0.5 diverges on a ring of
    eight; a copy for each neighbour. Singhal et al. 2024, arXiv 2410.09432; Koloskova, Stich, Jaggi 2019, arXiv 1902.00340.
    """
    check_split(split)
    if not 0 < gamma <= 1:
        raise ValueError(f"rule.gamma = {gamma!r} is not allowed; allowed: a number above 0, up to 1")
    beside = residual_layout(layout, residual_rank)
    whole = residual_layout(layout, largest_rank(beside) + largest_rank(layout) or None)  # a copy follows adapter and residual

    def outgoing(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        row = x.clone()
        for pairs in layout.shapes():
            left, right = product_of(state["copy"], whole.like(pairs))
            parts = [product_of(x, pairs), product_of(state["residual"], beside.like(pairs)), (-left, right)]
            svd = truncate(*joined(parts), min(own_rank(layout, ranks, round.peer), pairs[0].rank))
            write_slots(row, pairs, svd.vh, svd.u * svd.s[:, None])
        return row, state

    def combine(out: Tensor, received: Received, state: State) -> State:
        ids = torch.tensor(received.peers)
        if "holders" in state and state["holders"].tolist() != ids.tolist():
            raise ConnectionError(f"rule fedex_choco: peer {received.round.peer} received {ids.tolist()} in round "
                                  f"{received.round.t} and "
                                  f"{state['holders'].tolist()} before; its copies are out of step")
        known = state.get("copies", state["copy"].new_zeros(len(ids), whole.size))
        copies = empty_rows(len(ids), whole.size, dtype=out.dtype, device=out.device)
        for pairs in layout.shapes():
            wholes = whole.like(pairs)
            # one copy at a time: in a batch its bits would depend on how many this peer holds, and on its place among them
            for copy, before, row in zip(copies, known, received.rows, strict=True):
                svd = truncate(*joined([product_of(before, wholes), product_of(row, pairs)]), wholes[0].rank)
                write_pairs(copy, wholes, svd.vh, svd.u * svd.s[:, None])
        pull = gamma * received.weights
        pull[received.own] -= pull.sum()

        def products(pairs):
            wholes = whole.like(pairs)
            moves = [(strength.to(out) * left, right)
                     for strength, (left, right) in zip(pull, (product_of(copy, wholes) for copy in copies), strict=True)]
            return [product_of(out, pairs), product_of(state["residual"], beside.like(pairs)), *moves]
        new = split_model(out, layout, beside, own_rank(layout, ranks, received.round.peer), products, split)
        return new | {"copies": copies, "copy": copies[received.own].clone(), "holders": ids}

    def init(x: Tensor) -> State:
        return {**no_residual(beside)(x), "copy": x.new_zeros(whole.size)}

    return pair_gossip(layout, combine, ranks=ranks, init=init, outgoing=outgoing, diagnostics=DIAGNOSTICS,
                       residual=beside, needs="static", lossless=True, facts={"gamma": gamma, "residual_rank": largest_rank(beside)})


def residual_layout(layout: Layout, rank: int | None) -> Layout:
    """The layout of a residual of rank `rank` (None: four times the adapter's) in the layers of `layout`, scaled as they are."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rule.residual_rank = {rank!r} is not allowed; allowed: a whole number from 1, "
                         "or null for four times lora.rank")
    return make_layout([(p.name, min(rank or 4 * p.rank, p.d_in, p.d_out), p.d_in, p.d_out, p.scaling) for p in layout.pairs])


def largest_rank(layout: Layout) -> int:
    return max((pair.rank for pair in layout.pairs), default=0)


def own_rank(layout: Layout, ranks: Sequence[int] | None, peer: int) -> int:
    return largest_rank(layout) if ranks is None else ranks[peer]


def no_residual(beside: Layout) -> Callable[[Tensor], State]:
    """The state before the first round: E = 0."""
    def init(x: Tensor) -> State:
        nothing = torch.zeros((), dtype=torch.float64, device=x.device)
        row = empty_rows(1, beside.size, dtype=x.dtype, device=x.device)[0]
        return {"residual": row, "residual_norm": nothing, "tail_energy": nothing}
    return init


def product_of(row: Tensor, pairs: Sequence[Pair]) -> Product:
    return stack_b(row, pairs), stack_a(row, pairs)


def joined(products: Iterable[Product]) -> Product:
    """The sum of products as one: [left | left' | ...] [right; right'; ...]."""
    lefts, rights = zip(*products, strict=True)
    return torch.cat(lefts, -1), torch.cat(rights, -2)


class Tally:
    """What was cut and what was kept beside, over all layers, scaled as ΔW is."""

    def __init__(self, like: Tensor):
        self.lost, self.kept = torch.zeros(2, dtype=torch.float64, device=like.device)

    def add(self, pairs: Sequence[Pair], error: Tensor, kept: Tensor) -> None:
        squared = scalings(pairs, error).square()
        self.lost = self.lost + (squared * error.double().square()).sum()
        self.kept = self.kept + (squared * kept.double().square().sum(-1)).sum()

    def state(self) -> State:
        return {"truncation_error": self.lost.sqrt(), "residual_norm": self.kept.sqrt()}


def split_model(out: Tensor, layout: Layout, beside: Layout, rank: int, products: Callable[[Sequence[Pair]], list[Product]],
                split: str, total: int | None = None, tidy: bool = False) -> State:
    """The leading `rank` directions of the model into row `out`, the next ones into the residual, at most `total` in all.

    products(pairs): what sums to the model in the layers of one shape. Where the model is zero the row keeps its factors.
    tidy: directions that are nothing but rounding are left out, so that the residual fills no more slots than it needs.
    """
    tally, energy, tail = Tally(out), 0.0, 0.0
    row = empty_rows(1, beside.size, dtype=out.dtype, device=out.device)[0]
    for pairs in layout.shapes():
        others, kept = beside.like(pairs), min(rank, pairs[0].rank)
        svd = truncate(*joined(products(pairs)), kept + others[0].rank if total is None else total)
        if tidy:
            svd = cut(svd, (svd.s > 10 * torch.finfo(svd.s.dtype).eps * svd.s[:, :1]).sum(-1).clamp_min(kept))
        own_a, own_b = stack_a(out, pairs), stack_b(out, pairs)
        if kept:
            new_a, new_b = refactor(head_of(svd, kept), own_a[:, :kept], split)
            alive = (svd.s[:, 0] > 0)[:, None, None]
            write_slots(out, pairs, torch.where(alive, new_a, own_a[:, :kept]), torch.where(alive, new_b, own_b[..., :kept]))
        write_slots(row, others, svd.vh[:, kept:], (svd.u * svd.s[:, None])[..., kept:])
        tally.add(pairs, svd.error, svd.s[:, kept:])
        squared = scalings(pairs, out).square()[:, None] * svd.spectrum.double().square()
        energy, tail = energy + squared.sum(), tail + squared[:, kept:].sum()
    share = torch.where(energy > 0, tail / energy.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(energy))
    return {"residual": row, "tail_energy": share, **tally.state()}


def head_of(svd: Truncated, rank: int) -> Truncated:
    return svd._replace(u=svd.u[..., :rank], s=svd.s[..., :rank], vh=svd.vh[..., :rank, :])


def restart(out: Tensor, layout: Layout, rank: int, seed: int) -> None:
    """B = 0 and a fresh A ~ U(-1/sqrt(I), 1/sqrt(I)) in the first `rank` slots, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for pair in layout.pairs:
        draw = (2 * torch.rand(pair.rank, pair.d_in, generator=generator) - 1) * pair.d_in ** -0.5
        a_view(out, pair).zero_()[:rank] = draw[:rank].to(out)
        b_view(out, pair).zero_()
