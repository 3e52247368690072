"""Adapters of other tasks, kept and not averaged: sparse B over a frozen A of every peer's own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.frames import Frames, make_frames
from dfl.adapters.layout import Layout, a_view, b_view, empty_rows, make_layout
from dfl.plugins import check_choice, check_count, check_share
from dfl.rules.base import BOTH, mean_of_groups, parts_of
from dfl.slots import Inbox, Message, Round, Rule, State

LAYERS = ("spectrum", "even")
LEAST, WORD = 0.05, 63  # of a layer's numbers; bits of a bitmap in an int64, none of them its sign


def task_bank(layout: Layout, *, density: float = 0.5, layers: str = "spectrum", refresh: int = 10, forward: bool = True,
         peers: int | None = None, frames: Frames | None = None,
         spectra: Mapping[int, Sequence[float]] | None = None) -> Rule:
    """Keep every neighbour's adapter beside one's own, B sparse over a frozen A of each peer's own (sparse-and-orthogonal LoRA).

    Peer i's model is W0 + s (B_i A_i + sum_j B_j A_j), over the j that it has received from: a bank of adapters that are
    summed. A_i A_j^T = 0 (`lora.adapter: orthogonal`), so that <B_i A_i, B_j A_j>_F = 0 whatever B is, and an input in the
    rows of A_i meets B_i alone; B_j and B_i are never averaged, which would mean nothing. forward false: one trains and is
    evaluated by one's own adapter, and the bank is for inference (`dfl.adapters.router` weighs it by the input).

    B_i has rho_l of the numbers of layer l, and exactly zero elsewhere. In every `refresh`-th round, the first among them,
    all are trained; then the rho_l largest |B| are kept, and the others are zeroed after every step until the next. rho_l =
    clip(c s_l / mean s, 0.05, 1) with sum_l rho_l size_l = density sum_l size_l; s_l with layers spectrum (sum_k
    sigma_k)^2 / sum_k sigma_k^2, the participation ratio of the covariance of the layer's inputs on the peer's own
    examples, and 1 with even. A message is the numbers that are kept and a bitmap, an eighth of a byte for each number of
    B; A follows from the seed. Keeps no mean: what one peer knows of another is what it last received. Yang, Wang, Huan,
    Chen, Quek, Yin 2026, arXiv 2602.20492, of which the density's formula and the pruning are not known to us; ours.
    """
    check_share("rule.density", density)
    check_choice("rule.layers", layers, LAYERS)
    check_count("rule.refresh", refresh)
    num, cut, sizes = peers or 1, layout.groups["B"], [pair.d_out * pair.rank for pair in layout.pairs]
    beside = make_layout([(p.name, num * p.rank, p.d_in, p.d_out, p.scaling) for p in layout.pairs])
    kept: dict[int, list[int]] = {}
    of_peer = make_frames(layout, 0, num) if frames is None else frames

    def init(x: Tensor) -> State:
        return {"residual": empty_rows(1, beside.size, dtype=x.dtype, device=x.device)[0],
                "mask": torch.ones(cut.stop - cut.start, dtype=torch.bool, device=x.device)}

    def counts(peer: int) -> list[int]:
        if peer not in kept:
            scores = spectra[peer] if spectra is not None and layers == "spectrum" else [1.0] * len(sizes)
            kept[peer] = [max(1, round(share * size)) for share, size in zip(densities(scores, sizes, density), sizes, strict=True)]
        return kept[peer]

    def mask_of(x: Tensor, state: State, round: Round) -> Tensor:
        """Which numbers of B are kept from this round on."""
        if round.t % refresh:
            return state["mask"]
        chosen = torch.zeros_like(state["mask"])
        for pair, count in zip(layout.pairs, counts(round.peer), strict=True):
            at = pair.b - cut.start
            largest = x[pair.b:pair.b + pair.d_out * pair.rank].abs().argsort(descending=True, stable=True)[:count]
            chosen[at + largest] = True
        return chosen

    def after_step(x: Tensor, state: State, round: Round, k: int) -> Tensor:
        out = x.clone()
        if round.t % refresh:
            out[cut] *= state["mask"]
        return out

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        _check_frame(x, round.peer)
        mask = mask_of(x, state, round)
        parts = {"B": x[cut][mask], **parts_of(x, layout, round.plan.sends - BOTH)}
        return Message(parts, {"bitmap": packed(mask).cpu()}), state

    def _check_frame(x: Tensor, peer: int) -> None:
        if not torch.equal(of_peer(peer)[layout.groups["A"]].to(x), x[layout.groups["A"]]):
            raise TypeError(f"peer {peer} holds another A than the frozen one of its own, beside which its B means nothing")

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, mask = x.clone(), mask_of(x, state, round)
        out[cut] *= mask
        residual = state["residual"].clone()
        for j in (j for j in inbox if j != round.peer):
            row = torch.zeros_like(x)
            row[cut] = unpacked(inbox[j], cut.stop - cut.start)
            a = of_peer(j).to(x)
            for pair, place in zip(layout.pairs, beside.pairs, strict=True):
                slot = slice(j * pair.rank, (j + 1) * pair.rank)
                a_view(residual, place)[slot], b_view(residual, place)[:, slot] = a_view(a, pair), b_view(row, pair)
        if len(inbox) > 1:
            mean_of_groups(out, layout, round.plan.sends - BOTH, inbox, round)
        return out, {"residual": residual, "mask": mask}

    def readable(message: Message, own: Message, round: Round) -> bool:
        same = message.parts.keys() == own.parts.keys() and message.meta.keys() == own.meta.keys()
        if not same or message.meta["bitmap"].shape != own.meta["bitmap"].shape:
            return False
        others = all(message.parts[name].shape == part.shape for name, part in own.parts.items() if name != "B")
        return others and int(bits(message.meta["bitmap"], cut.stop - cut.start).sum()) == message.parts["B"].numel()

    return Rule(init, send, mix, after_step=after_step, takes=frozenset({"own"}), residual=beside if forward else None,
                readable=readable, index=frozenset({"bitmap"}), facts={"density": density, "layers": layers, "refresh": refresh})


def densities(scores: Sequence[float], sizes: Sequence[int], density: float) -> list[float]:
    """rho_l = clip(c s_l / mean s, 0.05, 1), c by bisection so that sum_l rho_l size_l = density sum_l size_l, where that can be."""
    mean, budget = sum(scores) / max(1, len(scores)), density * sum(sizes)

    def shares(c: float) -> list[float]:
        return [min(1.0, max(LEAST, c * score / mean if mean else density)) for score in scores]

    low, high = 0.0, 1.0 / min((score / mean for score in scores if score > 0), default=1.0) if mean else 1.0
    for _ in range(60):
        middle = (low + high) / 2
        used = sum(share * size for share, size in zip(shares(middle), sizes, strict=True))
        low, high = (middle, high) if used < budget else (low, middle)
    return shares(high)


def packed(mask: Tensor) -> Tensor:
    """A mask (M,) as int64 words of 63 bits."""
    words = -(-len(mask) // WORD)
    padded = torch.zeros(words * WORD, dtype=torch.int64, device=mask.device)
    padded[:len(mask)] = mask
    return (padded.view(words, WORD) << torch.arange(WORD, device=mask.device)).sum(1)


def bits(words: Tensor, num: int) -> Tensor:
    """What `packed` was given, (num,) bool."""
    return ((words[:, None] >> torch.arange(WORD, device=words.device)) & 1).bool().flatten()[:num]


def unpacked(message: Message, num: int) -> Tensor:
    """B of a message, (num,), zero where nothing is kept."""
    values = message.parts["B"]
    row = torch.zeros(num, dtype=values.dtype, device=values.device)
    row[bits(message.meta["bitmap"].to(values.device), num)] = values
    return row
