"""Rules that mix linear sketches of products, which lose nothing to truncation between rounds: FedASK.

A sketch of X (O, I) is Y = X Omega (O, s) and Z = Psi X (l, I) with fixed random Omega, Psi, the same at every peer. It
is linear in X, so a sketch of the mean is the mean of sketches, after any number of rounds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.batched import least_squares, qr
from dfl.adapters.layout import Layout, Pair, scalings, stack_a, stack_b
from dfl.adapters.lowrank import align, refactor, truncate
from dfl.plugins import check_count
from dfl.rules.base import BOTH, mean_of_groups, parts_of, weighted_mean
from dfl.rules.pairs import write_slots
from dfl.rules.products import check_gauge, check_split
from dfl.seeds import derive
from dfl.slots import Inbox, Message, Round, Rule, State


def fedask(layout: Layout, *, s: int | None = None, l: int | None = None, steps: int = 1, memory: bool = False,  # noqa: E741
           seed: int = 0, split: str = "balanced", gauge: str = "none",
           ranks: Sequence[int] | None = None) -> Rule:
    """Mix sketches of products and decode what is trained from them (FedASK as gossip).

    (Y, Z)_i is the sketch of B_i A_i. Each round: mix, (Y, Z)_i <- sum_j w_ij (Y, Z)_j; decode, Q = orth(Y),
    C = argmin ||Psi Q C - Z||, B_i A_i <- best rank-R_i part of Q C: `decaf` through a sketch, exact while the rank of
    the mean is at most s. s = 2 R columns and l = 2 s rows by default: about three times the bytes of `lora`, whatever
    the rank of the peer. Wen, Zhu, Xu, Zhou, Han 2025, arXiv 2507.09990 (a server method of two stages; here both are
    in one message). memory: keep the sketch from round to round and add to it what training changed. Then, for doubly
    stochastic W and any ranks, the network mean of the sketches is kept: what truncation cuts stays. But it is not in
    the model that trains, so training adds it again: where R is too small for what the peers learn together, it
    overshoots. steps: with memory, rounds of mixing for each decoding; in between a peer trains on from the pair it
    has.
    """
    if not isinstance(memory, bool) or not memory and steps != 1:
        raise ValueError(f"rule.memory = {memory!r} is not allowed; allowed: true, or false where rule.steps = 1")
    for field, value in (("s", s), ("l", l), ("steps", steps)):
        if value is not None or field == "steps":
            check_count(f"rule.{field}", value)
    check_split(split)
    check_gauge(gauge)
    sketch = Sketch(layout, s, l, seed)

    def init(x: Tensor) -> State:
        held = sketch.of(x)
        return {"sketch": held, "held": held.clone(), "truncation_error": torch.zeros((), dtype=torch.float64, device=x.device)}

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        held = sketch.of(x)
        state = {**state, "sketch": state["sketch"] + (held - state["held"]) if memory else held, "held": held}
        return Message({"sketch": state["sketch"], **parts_of(x, layout, round.plan.sends - BOTH)}), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out = x.clone()
        if len(inbox) == 1:
            return out, {**state, "truncation_error": torch.zeros_like(state["truncation_error"])}
        mean_of_groups(out, layout, round.plan.sends - BOTH, inbox, round)
        state = {**state, "sketch": weighted_mean({j: message.parts["sketch"] for j, message in inbox.items()}, round.weights)}
        if (round.t + 1) % steps == 0:
            error = decode(layout, sketch, state["sketch"], out, split, gauge, None if ranks is None else ranks[round.peer])
            state |= {"held": sketch.of(out), "truncation_error": error}
        return out, state

    return Rule(init, send, mix, product=True, changes_basis=gauge == "none", averages=True, takes=frozenset({"pairs"}),
                facts={"s": s, "l": l, "steps": steps, "memory": memory, "split": split, "gauge": gauge})


class Sketch:
    """The random matrices of each shape of layers, and where Y and Z of its layers lie in a flat sketch."""

    def __init__(self, layout: Layout, s: int | None, l: int | None, seed: int):  # noqa: E741
        self.parts: list[tuple[list[Pair], Tensor, Tensor]] = []
        self._made: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for index, pairs in enumerate(layout.shapes()):
            rank, d_in, d_out = pairs[0].rank, pairs[0].d_in, pairs[0].d_out
            columns = min(s or 2 * rank, d_in, d_out)
            rows = min(max(l or 2 * columns, columns), d_out)
            generator = torch.Generator().manual_seed(derive(seed, "sketch", index))
            omega = torch.randn(d_in, columns, dtype=torch.float64, generator=generator) / columns ** 0.5
            psi = torch.randn(rows, d_out, dtype=torch.float64, generator=generator) / rows ** 0.5
            self.parts.append((pairs, omega, psi))
        self.size = sum(len(pairs) * (pairs[0].d_out * omega.shape[1] + psi.shape[0] * pairs[0].d_in)
                        for pairs, omega, psi in self.parts)

    def _like(self, row: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Omega and Psi of each shape in the type of a row, where it is; made once."""
        key = (row.dtype, row.device)
        if key not in self._made:
            self._made[key] = [(omega.to(row), psi.to(row)) for _, omega, psi in self.parts]
        return self._made[key]

    def of(self, row: Tensor) -> Tensor:
        """The sketch (size,) of the products of a row, in its type."""
        flat = [row.new_zeros(0)]
        for (pairs, *_), (omega, psi) in zip(self.parts, self._like(row), strict=True):
            a, b = stack_a(row, pairs), stack_b(row, pairs)
            flat += [(b @ (a @ omega)).flatten(), ((psi @ b) @ a).flatten()]
        return torch.cat(flat)

    def read(self, flat: Tensor) -> list[tuple[list[Pair], Tensor, Tensor, Tensor]]:
        """(pairs, Y (L, O, s), Z (L, l, I), Psi) of each shape."""
        found, start = [], 0
        for pairs, omega, psi in self.parts:
            of_y, of_z = (len(pairs), pairs[0].d_out, omega.shape[1]), (len(pairs), psi.shape[0], pairs[0].d_in)
            middle = start + of_y[0] * of_y[1] * of_y[2]
            stop = middle + of_z[0] * of_z[1] * of_z[2]
            found.append((pairs, flat[start:middle].view(of_y), flat[middle:stop].view(of_z), psi))
            start = stop
        return found


def decode(layout: Layout, sketch: Sketch, flat: Tensor, out: Tensor, split: str, gauge: str, rank: int | None) -> Tensor:
    """Write the best pairs of the sketched products into row `out`; the truncation error, scaled as ΔW is.

    Where a product is zero the peer's own A stays, with B = 0.
    """
    squared = torch.zeros((), dtype=torch.float64, device=out.device)
    for pairs, y, z, psi in sketch.read(flat.double()):
        q = qr(y)[0]
        core = least_squares(psi.to(q) @ q, z)
        kept = pairs[0].rank if rank is None else rank
        svd = truncate(q, core, kept)
        own_a, own_b = stack_a(out, pairs)[:, :kept].double(), stack_b(out, pairs)[..., :kept].double()
        a, b = refactor(svd, own_a, split)
        if gauge == "own":
            a, b, _ = align(a, b, own_a, own_b)
        alive = (svd.spectrum[:, 0] > 0)[:, None, None]
        a, b = torch.where(alive, a, own_a), torch.where(alive, b, torch.zeros_like(b))
        write_slots(out, pairs, a.to(out), b.to(out))
        squared += (svd.error * scalings(pairs, out)).square().sum()
    return squared.sqrt()
