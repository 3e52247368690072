"""EventGraD: each tensor speaks for itself, when its norm has changed."""

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_count, check_number
from dfl.slots import Message, Round, State, Trigger

SLOPES = 2  # of the last events, whose mean is the next threshold


def eventgrad(*, horizon: float = 1.0, initial: int = 30, layout: Layout | None = None) -> Trigger:
    """Send each tensor when its norm has changed by what its own past makes likely (EventGraD).

    Tensor p (a layer's A or B, a head) goes where | ||p|| - ||p||_last | >= tau_p, `_last` at its last event. Each round
    tau_p <- horizon tau_p; at an event tau_p <- the mean of the last two slopes | ||p|| - ||p||_last | / rounds since.
    In the first `initial` rounds all of them go. horizon 0 is plain gossip. Receivers go on with the tensors that they
    hold; differences of these are mixed, which keeps the network mean where the paper mixes the values. A norm does not
    see a rotation: `event` compares the numbers. Ghosh, Aquino, Gupta 2021, arXiv 2103.07454.
    """
    check_number("trigger.horizon", horizon)
    check_count("trigger.initial", initial, least=1)

    def norms(message: Message) -> Tensor:
        cuts = tensors(message).values()
        return torch.stack([torch.linalg.vector_norm(message.parts[part][columns].double()) for part, columns in cuts]).cpu()

    def tensors(message: Message) -> dict[str, tuple[str, slice]]:
        assert layout is not None  # the run gives it
        return {f"{part}{k}": (part, cut) for part in message.parts for k, cut in enumerate(_cuts(layout, part))}

    def init(message: Message) -> State:
        zeros = torch.zeros(len(tensors(message)), dtype=torch.float64)
        return {"norm": norms(message), "threshold": zeros, "slope": zeros, "last": zeros.long()}

    def decide(message: Message, state: State, round: Round) -> tuple[frozenset[str], State]:
        names, now = list(tensors(message)), norms(message)
        state = {name: value.cpu() for name, value in state.items()}  # a run that goes on on a GPU has put them there
        if len(now) != len(state["norm"]):  # other groups travel in this round: nothing to compare with
            return frozenset(names), init(message) | {"last": torch.full((len(names),), round.t)}
        change, threshold = (now - state["norm"]).abs(), state["threshold"] * horizon
        fires = (change >= threshold) | (round.t < initial)
        slope = change / (round.t - state["last"]).clamp_min(1)
        return frozenset(name for name, fire in zip(names, fires.tolist(), strict=True) if fire), {
            "norm": torch.where(fires, now, state["norm"]),
            "threshold": torch.where(fires, (slope + state["slope"]) / SLOPES, threshold),
            "slope": torch.where(fires, slope, state["slope"]), "last": torch.where(fires, round.t, state["last"])}

    return Trigger(init, decide, tensors=tensors, facts={"horizon": horizon, "initial": initial})


def _cuts(layout: Layout, part: str) -> list[slice]:
    """Where the tensors of a group lie in it."""
    start = layout.groups[part].start
    if part in "AB":
        places = [(pair.a, pair.rank * pair.d_in) if part == "A" else (pair.b, pair.d_out * pair.rank) for pair in layout.pairs]
        return [slice(at - start, at - start + size) for at, size in places]
    tensors = {"M": layout.magnitudes, "core": layout.cores, "head": layout.head}[part]
    ends = [tensor.offset - start for tensor in tensors] + [layout.groups[part].stop - start]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
