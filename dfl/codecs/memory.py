"""What a codec does about that which a message leaves out: three memories around a compressor.

differences: every peer has a public copy x^_i of its message at itself and at its neighbours, and q_i = C(m_i - x^_i)
moves all of them, x^_i <- x^_i + q_i (CHOCO). The first message of a part, and one of another length, goes in full. As
x^_i tends to m_i, what is left out tends to zero. Needs the same graph in every round, and that nothing is lost.

feedback: what is left out is added to the next message, v_i = m_i + e_i, m^_i = C(v_i), e_i <- v_i - m^_i (error
feedback). For every graph and channel; C acts on the message itself, so that an error in proportion to it stays.

none: m^_i = C(m_i), for a C that is right on average or alike at all peers.

A mix is x_i + gamma sum_j w_ij (m^_j - m^_i) in each, whose sum over peers is that of x for doubly stochastic W: the
network mean is kept exactly, whatever C does. Koloskova, Stich, Jaggi 2019, arXiv 1902.00340 (CHOCO); Tang, Lian, Qiu,
Yuan, Zhang, Zhang, Liu 2019, arXiv 1907.07346 (DeepSqueeze).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.codecs.step import step_size
from dfl.plugins import check_choice
from dfl.slots import Codec, State


class Compressor(NamedTuple):
    """C as bytes.

    pack(name, values (M,), seed) -> uint8;  unpack(name, uint8, M) -> (M,), of a type of its own; ValueError or
    RuntimeError for bytes that `pack` cannot have made. kept: omega of E ||C(v) - v||² <= (1 - omega) ||v||².
    draws: as that of a Codec; seed is None where it is empty.
    """

    pack: Callable[[str, Tensor, int | None], Tensor]
    unpack: Callable[[str, Tensor, int], Tensor]
    kept: float
    draws: str = ""


def remembering(compressor: Compressor, memory: str, allowed: Sequence[str], gamma: float | None, topology: Any, *,
                rounds: bool = False) -> Codec:
    """A codec of a compressor with a memory, one of `allowed`. gamma: the step of a mix, None: found for the topology (`step_size`).

    rounds: the compressor does no more than rounding, so that a step of 1 is right with error feedback, and every message
    resembles what was to be said. ValueError for a memory or a step that cannot be.
    """
    check_choice("codec.memory", memory, allowed)
    step = step_size(compressor, memory, gamma, topology, rounds)
    facts = {"codec_memory": memory, "codec_gamma": step}
    if memory == "differences":
        return _differences(compressor)._replace(gamma=step, facts=facts)

    def encode(parts: Mapping[str, Tensor], state: State, key: int | None) -> tuple[dict[str, Tensor], State]:
        found, state = {}, dict(state)
        for index, (name, part) in enumerate(parts.items()):
            error = state.get(name)
            wanted = part if error is None or error.shape != part.shape else part + error
            found[name] = compressor.pack(name, wanted, None if key is None else key + index)
            if memory == "feedback":
                state[name] = wanted - compressor.unpack(name, found[name], part.numel()).to(part)
        return found, state

    def decode(name: str, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return compressor.unpack(name, data, numel).to(dtype)

    return Codec(lambda parts: {}, encode, decode, draws=compressor.draws, partial=not rounds, gamma=step, facts=facts)


def _differences(compressor: Compressor) -> Codec:
    def encode(parts: Mapping[str, Tensor], state: State, key: int | None) -> tuple[dict[str, Tensor], State]:
        found, state = {}, dict(state)
        for index, (name, part) in enumerate(parts.items()):
            copy = state.get(name)
            if copy is None or copy.shape != part.shape:
                found[name] = part.contiguous().view(torch.uint8)
            else:
                found[name] = compressor.pack(name, part - copy, None if key is None else key + index)
            state[name] = update(name, found[name], copy, part.numel(), part.dtype)
        return found, state

    def update(name: str, data: Tensor, copy: Tensor | None, numel: int, dtype: torch.dtype) -> Tensor:
        if copy is None or len(copy) != numel:
            full = data.view(dtype)
            if len(full) != numel:
                raise ValueError(f"{len(full)} numbers of part {name!r}, expected {numel}: a difference to what was never received")
            return full.clone()
        return copy + compressor.unpack(name, data, numel).to(dtype)

    def decode(name: str, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        raise AssertionError("a codec of differences decodes by `update`")

    return Codec(lambda parts: {}, encode, decode, draws=compressor.draws, update=update)
