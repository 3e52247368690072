"""The control plane: what the processes of a run agree on, tell each other and add up. No process is special.

With P processes an agreement takes about log8 P steps of 7 messages of every process, what all tell about log2 P messages, however
many peers there are; sums over peers go once around the ring of processes, in pieces, so that a process sends twice their length
whatever P is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dfl.transport.base import ANY, add_in_order
from dfl.transport.link import Link

# what a transfer is, for its frames and for errors
_AGREED, _TABLE, _TOLD, _SUM = "agreement", "what all tell", "what process 0 tells", "sum over peers"
PIECE = 2**16  # numbers (float64) of a sum that are under way at a time
MOST = 2**31  # bytes that a process may want to tell
Check = Callable[[int, Tensor], None]  # of the process at a place, and what it told
DIRECT = 8  # processes that agree in one step, each telling all others; a power of two


class ControlPlane:
    """Agreements between the processes of a link. `sent`: the bytes of agreements and texts, `summed` those of sums."""

    def __init__(self, link: Link):
        self.link, self.sent, self.summed = link, 0, 0

    @property
    def place(self) -> tuple[int, int]:
        """Of this process among those that take part, and how many these are. Below, a process is its place."""
        return self.link.members.index(self.link.rank), len(self.link.members)

    def _move(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor]) -> int:
        members = self.link.members
        return self.link.transfer(what, {members[k]: tensor for k, tensor in sent.items()},
                                  {members[k]: tensor for k, tensor in received.items()})

    def agree(self, value: int, most: int = ANY) -> int:
        """The largest value that any process gave. ConnectionError names who told one that is not 0 to `most`: nobody passes it on."""
        return int(self._all_reduce(torch.tensor([value]), torch.maximum, partial(self._check_word, most))[0])

    def _check_word(self, most: int, place: int, told: Tensor) -> None:
        if not 0 <= (word := int(told[0])) <= most:
            process = self.link.members[place]
            what = f"{self.link.describe(process)} said {word} in an agreement {self.link.when()}; allowed: 0 to {most}"
            raise self.link.fault(process, what)

    def summary(self, values: Tensor) -> Tensor:
        """values (3, K) float64 of every process: the sums of the first rows, the least of the second, the largest of the third."""
        return self._all_reduce(values, _summary)

    def _all_reduce(self, mine: Tensor, both, check: Check = lambda place, told: None) -> Tensor:
        """`both(a, b)` of all processes' tensors, the same bits on all of them: recursive doubling (Thakur et al. 2005), several
        doublings in a step, as a step costs the wait for the slowest and these messages are small.

        With more processes than DIRECT, those beyond the largest power of two give theirs to another before, and get the result after.
        """
        rank, size = self.place
        if size <= DIRECT:
            return _in_pairs(self._all_of(range(size), mine, check), both)
        core = _core(size)
        if rank >= core:
            self._swap(rank - core, mine, None)
            return self._swap(rank - core, None, torch.empty_like(mine), check)
        outer = rank + core if rank + core < size else None
        if outer is not None:
            mine = both(mine, self._swap(outer, None, torch.empty_like(mine), check))
        step = 1
        while step < core:
            width = min(DIRECT, core // step)
            first = rank - rank // step % width * step
            mine = _in_pairs(self._all_of(range(first, first + width * step, step), mine, check), both)
            step *= width
        if outer is not None:
            self._swap(outer, mine, None)
        return mine

    def _all_of(self, group: range, mine: Tensor, check: Check) -> list[Tensor]:
        """The tensors of a group of processes, by process, on all of them."""
        here = self.place[0]
        theirs = {process: torch.empty_like(mine) for process in group if process != here}
        self.sent += self._move(_AGREED, dict.fromkeys(theirs, mine), theirs)
        for process, told in theirs.items():
            check(process, told)
        return [mine if process == here else theirs[process] for process in group]

    def _swap(self, process: int, mine: Tensor | None, theirs: Tensor | None, check: Check | None = None) -> Tensor | None:
        self.sent += self._move(_AGREED, {} if mine is None else {process: mine}, {} if theirs is None else {process: theirs})
        if check is not None:
            check(process, theirs)
        return theirs

    def share(self, data: bytes) -> list[bytes]:
        """What each process gave, by process, on all of them."""
        sizes = self._table(torch.tensor([len(data)]))[:, 0].tolist()
        for process, size in enumerate(sizes):
            self.link.check_size(self.link.members[process], size, MOST)
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[:len(data)] = _tensor(data)
        return [bytes(row[:size].numpy()) for row, size in zip(self._table(mine), sizes, strict=True)]

    def _table(self, mine: Tensor) -> Tensor:
        """The rows (K,) of all processes, (processes, K) on all of them: the algorithm of Bruck et al. 1997."""
        rank, size = self.place
        rows, step = mine[None], 1
        while step < size:
            count = min(step, size - step)
            theirs = rows.new_empty(count, len(mine))
            self.sent += self._move(_TABLE, {(rank - step) % size: rows[:count].contiguous()}, {(rank + step) % size: theirs})
            rows, step = torch.cat([rows, theirs]), 2 * step
        return rows.roll(rank, 0)

    def spread(self, data: bytes) -> bytes:
        """What process 0 gave, on all of them; what the others gave is not used. Along a binomial tree."""
        rank, size = self.place
        length = self.agree(len(data) if rank == 0 else 0)
        self.link.check_size(self.link.members[0], length, MOST)
        told = _tensor(data) if rank == 0 else torch.empty(length, dtype=torch.uint8)
        step = 1
        while step < size:
            if rank < step and rank + step < size:
                self.sent += self._move(_TOLD, {rank + step: told}, {})
            elif step <= rank < 2 * step:
                self._move(_TOLD, {}, {rank - step: told})
            step *= 2
        return bytes(told.numpy())

    def total(self, rows: Tensor) -> Tensor:
        """The sum (M,) float64 of the rows (P, M) of all processes, on all of them, added one by one in the order of processes.

        So its bits do not depend on which process holds which row. A piece goes from the first process to the last, each adding
        its rows, and the sum from the last around to all others.
        """
        (rank, size), length = self.place, rows.shape[1]
        result = torch.zeros(length, dtype=torch.float64, device=self.link.group.wire)
        pieces = [slice(start, min(start + PIECE, length)) for start in range(0, length, PIECE)]
        first, last = rank == 0, rank == size - 1
        ahead, behind = (rank + 1) % size, (rank - 1) % size
        for piece, before in zip([*pieces, None], [None, *pieces], strict=True):  # one is sent on while the next arrives
            outgoing = {} if before is None or last else {ahead: result[before]}
            self.summed += self._move(_SUM, outgoing, {} if piece is None or first else {behind: result[piece]})
            if piece is not None:
                add_in_order(result[piece], rows[:, piece])
        stays = size == 1 or rank == size - 2  # the last but one passes nothing on: the last process has it
        for piece, before in zip([*pieces, None], [None, *pieces], strict=True):
            source = piece if last else before
            outgoing = {} if source is None or stays else {ahead: result[source]}
            self.summed += self._move(_SUM, outgoing, {} if piece is None or last else {behind: result[piece]})
        return result.to(rows.device)


def _core(size: int) -> int:
    """The largest power of two that is no more than size."""
    return 1 << (size.bit_length() - 1)


def _in_pairs(told: list[Tensor], both) -> Tensor:
    """Values of processes put together in the order of recursive doubling: those beyond a power of two, neighbours, and so on."""
    core, values = _core(len(told)), torch.stack(told)
    if core < len(told):
        beyond = len(told) - core
        values = torch.cat([both(values[:beyond], values[core:]), values[beyond:core]])
    while len(values) > 1:
        values = both(values[::2], values[1::2])
    return values[0]


def _summary(one: Tensor, other: Tensor) -> Tensor:
    """Of (..., 3, K) each."""
    (sums, least, most), (more, low, high) = one.unbind(-2), other.unbind(-2)
    return torch.stack([sums + more, torch.minimum(least, low), torch.maximum(most, high)], -2)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
