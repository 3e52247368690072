"""What moves messages between peers, wherever they are hosted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dfl.transport.packet import Packet

SENT = ("wire_bytes", "control_bytes", "measured_bytes")  # what a transport counts
EXCHANGE, LOOK = "exchange", "look at neighbours"  # what moves: the messages of a round, or rows that are measured
ANY = 2**63 - 1  # what is agreed on is a number of any size
FREE = 128  # numbers before a row: room for the header and the table of its message
Arrived = dict[int, dict[int, Packet]]  # for each hosted peer, what its neighbours sent it, by peer id


class Transport(Protocol):
    """Moves encoded messages along the edges of a round. Counts the bytes that it sends to other processes, headers included."""

    @property
    def rank(self) -> int:
        """Which of `size` processes this is."""

    @property
    def size(self) -> int: ...

    wire_bytes: int  # of the messages of peers

    @property
    def control_bytes(self) -> int:
        """Of what processes agree on and tell each other: flags, texts, digests."""

    @property
    def measured_bytes(self) -> int:
        """Of rows and sums for measures, evaluation and the consensus model."""

    most: int  # a longer message is refused where its size is announced
    run: int  # a number that all processes of a run share; a message of another run is refused
    round: int | None  # the round at work, for messages of errors

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Arrived:
        """Deliver what hosted peers say in round t, and bring what hosted peers are told.

        packets: of each hosted sender; addressed: the peers, anywhere, that it goes to, among those `due`, whose rows
        of W(t) give weight to it; expected: for each hosted receiver the others that its row gives weight to. Who says
        nothing to a receiver is missing in what arrives there. what: EXCHANGE, or LOOK for rows that are only measured.
        """

    def begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
              due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Callable[[], Arrived]:
        """The same without waiting: what it gives waits for what arrives. What is given, and the tensors in it, may not change before;
        all processes do so at the same place among their exchanges, and exchange and agree on nothing else until then."""

    def lend(self, rows: Tensor) -> None:
        """Rows (P, D) with `FREE` numbers before each that nobody uses (`empty_rows`): a message that is the front of one of them may
        be sent from where it is, with its header before it. Such a row may not change before what `begin` gives has come back."""

    def newly_sent(self) -> list[int]:
        """The bytes of each kind of SENT since this was called last, or since the start."""

    def agree(self, value: int, most: int = ANY) -> int:
        """The largest value that any process gave. ConnectionError names who said something else than 0 to `most`, which no process
        says here: words that end a run for all are to be those of the run."""

    def summary(self, values: Tensor) -> Tensor:
        """values (3, K) float64 of every process: the sums of the first rows, the least of the second, the largest of the third.

        The same bits on all processes; those of the sums depend on how many there are, unless the sums are exact.
        """

    def total(self, rows: Tensor) -> Tensor:
        """The sum (M,) float64 of the rows (P, M) of all processes, on all of them: added one by one in peer order, so that the
        bits do not depend on who hosts which peer."""

    def share(self, data: bytes) -> list[bytes]:
        """What each process gave, by process, on all of them."""

    def spread(self, data: bytes) -> bytes:
        """What process 0 gave, on all of them; what the others gave is not used."""

    def watch(self, asked: Callable[[], bool]) -> None:
        """From now on the processes know of each other, without a message of the run: that they live, and that one is told to stop."""

    @property
    def told_to_stop(self) -> bool:
        """Whether `asked` of any process was true, a moment ago."""

    def describe(self, process: int) -> str:
        """A process for people: its number, its peers, its host."""

    def leave(self, error: BaseException) -> None:
        """This process fails: tell the others why, so that none waits for it. Nothing can be exchanged afterwards."""

    def close(self) -> None:
        """Leave together."""


def add_in_order(total: Tensor, rows: Tensor) -> None:
    """Add rows (P, M) to a total (M,) one by one, each rounded as if it came alone."""
    for row in rows:
        total += row.to(total.device)


def hosting(num_peers: int, num_processes: int) -> list[range]:
    """Which peers each process hosts: consecutive ids, as even as possible, the first processes one more."""
    if num_processes > num_peers:
        raise ValueError(f"peers = {num_peers} is fewer than the {num_processes} processes; "
                         f"allowed: at least {num_processes} peers, or at most {num_peers} processes")
    base, more = divmod(num_peers, num_processes)
    starts = [p * base + min(p, more) for p in range(num_processes + 1)]
    return [range(starts[p], starts[p + 1]) for p in range(num_processes)]


def edges_of(w: np.ndarray) -> list[tuple[int, int]]:
    """The edges (sender j, receiver i) along which W (N, N) has weight, ordered by sender, then receiver."""
    weighted = w != 0
    np.fill_diagonal(weighted, False)
    return [(int(j), int(i)) for j, i in np.argwhere(weighted.T)]


def links_of(topology: Any, t: int) -> list[tuple[int, int]]:
    """The same of W(t) by its columns, so that no table of all pairs of peers is made."""
    return [(j, i) for j in range(topology.num_peers) for i in topology.receivers(t, j)]
