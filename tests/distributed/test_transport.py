"""One scenario for every transport: what arrives, what it costs, what is refused."""

from itertools import product

import numpy as np
import pytest
import torch
from one_round import build
from processes import distributed, run_processes

import topologies
from dfl.adapters.layout import empty_rows, make_layout
from dfl.codecs import CODECS
from dfl.engine.gossip import Gossip
from dfl.methods import Choice
from dfl.transport import Distributed, InProcess, edges_of, frames, hosting
from dfl.transport.base import FREE
from dfl.transport.control import PIECE
from dfl.transport.packet import Packet

pytestmark = pytest.mark.distributed
NUM_PEERS, ROUNDS = 7, 6
LAYOUT = make_layout([("q", 3, 8, 6, 2.0), ("v", 3, 8, 6, 2.0), ("o", 2, 5, 9, 0.5)], [("classifier.weight", (4, 5))])


def graph():
    """Sparse and changing; in most rounds somebody is alone."""
    return topologies.build("edge_activation", NUM_PEERS, p=0.15, base="complete", seed=3)


def start_rows() -> torch.Tensor:
    x = empty_rows(NUM_PEERS, LAYOUT.size)
    x.copy_(torch.randn(NUM_PEERS, LAYOUT.size, generator=torch.Generator().manual_seed(0)))
    x[:, LAYOUT.groups["A"]] = x[0, LAYOUT.groups["A"]]  # common, for the methods that freeze it
    return x


def cpu_transport(num_peers: int = NUM_PEERS, **options) -> Distributed:
    return distributed(num_peers, **options)


def mix_rounds(transport, hosted, name: str, codec: str, params: dict, trigger="always", rounds: int = ROUNDS) -> torch.Tensor:
    built = build(name, LAYOUT, slots={"codec": codec, "trigger": trigger}, **params)
    x = empty_rows(len(hosted), LAYOUT.size)
    x.copy_(start_rows()[list(hosted)])
    heart = Gossip(built.method, LAYOUT, graph(), transport, hosted, x)
    for t in range(rounds):
        heart.round(t, x)
    return x


def gossip_worker(rank: int, *args) -> tuple:
    transport = cpu_transport()
    x = mix_rounds(transport, transport.hosted, *args)
    return transport.wire_bytes, x.numpy()


def joined(results) -> np.ndarray:
    """The rows of all peers, in peer order."""
    return np.concatenate([rows for _, rows in results])


RULES = {"lora": {}, "ffa": {}, "rolora": {}, "adf": {"T": 2}, "tad": {"T": 3}, "local": {}, "decaf": {}}


@pytest.mark.parametrize("head", ["frozen", "mixed", "local"])
@pytest.mark.parametrize("name", RULES)
def test_hosting_does_not_matter(name, head):
    params = RULES[name] | {"head": head}
    alone = mix_rounds(InProcess(), range(NUM_PEERS), name, "none", params).numpy()
    for num_processes in (2, 3):
        together = joined(run_processes(gossip_worker, num_processes, name, "none", params))
        np.testing.assert_array_equal(together, alone)


def goes_together(trigger: str, codec: str) -> bool:
    try:
        build("lora", LAYOUT, slots={"codec": codec, "trigger": trigger})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("trigger, codec", [both for both in product(("always", "event"), CODECS) if goes_together(*both)])
def test_hosting_does_not_matter_to_triggers_and_codecs(codec, trigger):
    """Some are silent, and who was no neighbour when a peer last spoke is told what it said then."""
    alone = mix_rounds(InProcess(), range(NUM_PEERS), "lora", codec, {}, trigger).numpy()
    for num_processes in (2, 3):
        together = joined(run_processes(gossip_worker, num_processes, "lora", codec, {}, trigger))
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("name", [name for name in RULES if name != "decaf"])
def test_learning_rate_zero_is_the_product_of_the_matrices(name):
    built = build(name, LAYOUT, **RULES[name], head="mixed")
    expected = start_rows().double().numpy()
    alone_somewhere = False
    for t in range(ROUNDS):
        w = graph().matrix(t)
        alone_somewhere |= bool((np.diag(w) == 1).any())
        for cut in LAYOUT.columns(built.sends(t)):
            expected[:, cut] = w @ expected[:, cut]
    assert alone_somewhere
    got = joined(run_processes(gossip_worker, 4, name, "none", RULES[name] | {"head": "mixed"}))
    np.testing.assert_allclose(got, expected, atol=1e-6)


BYTES = {"none": lambda n: 4 * n, "float16": lambda n: 2 * n, "bfloat16": lambda n: 2 * n, "int8": lambda n: n + 4 * -(-n // 256)}


@pytest.mark.parametrize("codec", BYTES)
def test_bytes_are_what_the_edges_need(codec):
    results = run_processes(gossip_worker, 3, "lora", codec, {})
    hosts = hosting(NUM_PEERS, 3)
    size = sum(-(-BYTES[codec](LAYOUT.length({group})) // 16) * 16 for group in "AB")  # each part at a multiple of 16 bytes
    least, num = 0, 0
    for t in range(ROUNDS):
        pairs = {}  # a message travels once to a process, however many of its peers receive it
        for sender, receiver in edges_of(graph().matrix(t)):
            a, b = ([p for p, peers in enumerate(hosts) if peer in peers][0] for peer in (sender, receiver))
            if a != b:
                pairs.setdefault((a, b), set()).add(sender)
        least += sum(frames.HEADER + len(senders) * size for senders in pairs.values())
        num += sum(len(senders) for senders in pairs.values())
    sent = sum(sent for sent, _ in results)
    assert least < sent <= least + 80 * num  # what describes a message is a few dozen bytes


def test_who_is_silent_sends_some_dozens_of_bytes():
    never = Choice("event", {"threshold": 1e9})  # but to those that it has never met
    speaking, silent = (sum(sent for sent, _ in run_processes(gossip_worker, 3, "lora", "none", {}, trigger, 60))
                        for trigger in ("always", never))
    assert 0 < silent < 0.5 * speaking


@pytest.mark.parametrize("codec, error", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_wire_precision_is_bounded(codec, error):
    exact = mix_rounds(InProcess(), range(NUM_PEERS), "lora", "none", {})
    rounded = mix_rounds(InProcess(), range(NUM_PEERS), "lora", codec, {})
    assert 0 < (exact - rounded).abs().max() < error * ROUNDS
    assert (exact.mean(0) - rounded.mean(0)).abs().max() < error * ROUNDS


def packet(data: torch.Tensor) -> Packet:
    return Packet({"x": data}, {"x": len(data)}, {"ranks": torch.tensor([257, -1])})


def swap(transport, rank: int, t: int, data: torch.Tensor):
    """Two peers of two processes tell each other something: what arrives."""
    return transport.exchange(t, {rank: packet(data)}, {rank: [1 - rank]}, {rank: [1 - rank]}, {rank: [1 - rank]})[rank][1 - rank]


def foreign_worker(rank: int, field: str) -> str:
    """Process 1 sends what process 0 must refuse."""
    transport = cpu_transport(2, run=7 + (rank if field == "run" else 0))
    if field == "peers" and rank == 1:
        outgoing = transport._outgoing
        transport._outgoing = lambda *given: {q: [entry._replace(peer=5) for entry in entries]
                                              for q, entries in outgoing(*given).items()}
    if field == "receivers" and rank == 1:
        outgoing = transport._outgoing
        transport._outgoing = lambda *given: {q: [entry._replace(receivers=[3]) for entry in entries]
                                              for q, entries in outgoing(*given).items()}
    try:
        swap(transport, rank, rank if field == "round" else 0, torch.zeros(12, dtype=torch.uint8))
    except ConnectionError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("field, said", [("run", "run"), ("round", "round"), ("peers", "peers"), ("receivers", "to [3]")])
def test_a_message_that_does_not_belong_is_rejected(field, said):
    found = run_processes(foreign_worker, 2, field)[0]
    assert found.startswith("process 1 (peer 1, ") and " sent " in found and said in found


def sizes_worker(rank: int) -> dict:
    """Peer j sends j * 5 + 1 bytes of value j, then many, then none: lengths that no receiver knows."""
    transport, found = cpu_transport(), {}
    edges = edges_of(graph().matrix(1))
    due = {peer: [i for j, i in edges if j == peer] for peer in transport.hosted}
    expected = {peer: [j for j, i in edges if i == peer] for peer in transport.hosted}
    for t, times in enumerate((1, 3_000_000, 2, 0)):
        packets = {peer: packet(torch.full((times * (peer * 5 + 1),), peer, dtype=torch.uint8)) for peer in transport.hosted}
        arrived = transport.exchange(t, packets, due if times else {}, due, expected)
        for peer, inbox in arrived.items():
            for j, got in inbox.items():
                assert got.meta["ranks"].tolist() == [257, -1] and (got.payload["x"] == j).all()
            found[t, peer] = {j: len(got.payload["x"]) for j, got in inbox.items()}
    return found


def test_messages_of_any_length_arrive_and_silence_too():
    edges = edges_of(graph().matrix(1))
    assert len({sender for sender, _ in edges}) > 2
    found = {}
    for part in run_processes(sizes_worker, 3):
        found |= part
    for t, times in enumerate((1, 3_000_000, 2, 0)):
        for peer in range(NUM_PEERS):
            assert found[t, peer] == {j: times * (j * 5 + 1) for j, i in edges if i == peer and times}


def control_worker(rank: int) -> tuple:
    transport = cpu_transport()
    numbers = torch.tensor([[1.5, rank], [rank, -rank], [rank, -rank]], dtype=torch.float64)
    texts = transport.share(b"x" * rank)
    told = transport.spread(bytes([rank]) * (rank + 1) * 1000)
    rows = ragged_rows()[list(transport.hosted)]
    return transport.agree(5 if rank == 1 else 2), transport.summary(numbers).tolist(), texts, told, transport.total(rows).numpy()


def ragged_rows() -> torch.Tensor:
    """More numbers than are under way at a time, of very different sizes: the order of adding shows."""
    generator = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.randint(-8, 9, (NUM_PEERS, 1), generator=generator)
    return sizes * torch.randn(NUM_PEERS, 2 * PIECE + 5, generator=generator)


@pytest.mark.parametrize("size", range(1, 8))
def test_agreements_and_sums_of_any_number_of_processes(size):
    alone = InProcess().total(ragged_rows()).numpy()
    np.testing.assert_allclose(alone, ragged_rows().double().sum(0).numpy(), rtol=1e-12, atol=1e-7)
    ranks = range(size)
    for agreed, (sums, least, most), texts, told, total in run_processes(control_worker, size):
        assert agreed == (5 if size > 1 else 2)
        assert sums == [1.5 * size, sum(ranks)] and least == [0, -max(ranks)] and most == [max(ranks), 0]
        assert texts == [b"x" * k for k in ranks] and told == bytes(1000)
        np.testing.assert_array_equal(total, alone)


def steps_worker(rank: int) -> tuple[int, int]:
    """The bytes that an agreement takes of this process, and those of a sum of 100,000 numbers."""
    transport = cpu_transport(16)
    transport.agree(rank)
    agreed = transport.control_bytes
    transport.total(torch.zeros(len(transport.hosted), 100_000))
    return agreed, transport.measured_bytes


def test_no_process_does_more_than_others_however_many_there_are():
    for size in (2, 4, 8):
        found = run_processes(steps_worker, size)
        assert {agreed for agreed, _ in found} == {(size - 1) * (frames.HEADER + 8)}
        assert max(summed for _, summed in found) < 2.01 * 800_000


def test_hosting_is_even_and_refuses_more_processes_than_peers():
    assert [list(r) for r in hosting(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match="peers = 3 is fewer than the 4 processes"):
        hosting(3, 4)


# -- a process that speaks the wire format and lies --------------------------------------------------------------------

LIES = {"cut": lambda frame: frame[:-24].clone(),  # what lies behind it in the receiver's buffer is from the round before
        "empty": lambda frame: frame[:0].clone(), "old": lambda frame: frame[:frames.HEADER].clone(),
        "changed": lambda frame: torch.cat([frame[:-1], frame[-1:] ^ 1]),
        "header": lambda frame: torch.cat([frame[:12] ^ 1, frame[12:]])}
SAID = {"cut": "digest is not that of its", "empty": "announces", "old": "digest is not that of its",
        "changed": "digest is not that of", "header": "announces"}


def lying_worker(rank: int) -> dict[str, str]:
    """What process 0 says to each lie of process 1 in a second round. An honest round comes first."""
    said = {}
    for lie, change in LIES.items():
        transport = cpu_transport(2, run=7)
        move, said[lie] = transport._begin_unknown, "accepted"
        for t in (0, 1):
            if rank == 1 and t == 1:
                transport._begin_unknown = lambda what, sent, incoming, move=move, change=change: move(
                    what, {q: change(frame) for q, frame in sent.items()}, incoming)
            message = torch.arange(88, dtype=torch.uint8) + 100 * t + rank
            try:
                got = swap(transport, rank, t, message).payload["x"]
                assert got.tolist() == (torch.arange(88, dtype=torch.uint8) + 100 * t + 1 - rank).tolist()
            except ConnectionError as error:
                said[lie] = str(error)
    return said


def test_what_is_not_the_message_it_says_it_is_ends_in_an_error_that_names_the_sender():
    said, honest = run_processes(lying_worker, 2)
    for lie, part in SAID.items():
        assert said[lie].startswith("process 1 (peer 1, ") and part in said[lie] and "in round 2" in said[lie], (lie, said[lie])
    assert set(honest.values()) == {"accepted"}


def lying_size_worker(rank: int, size: int) -> str:
    transport = cpu_transport(2, timeout=2.0)
    transport.most = 1000
    if rank == 1:
        move = transport._begin_unknown

        def lie(what, sent, incoming):
            for frame in sent.values():
                frame[28:36] = torch.tensor([size]).view(torch.uint8)
            return move(what, sent, incoming)
        transport._begin_unknown = lie
    try:
        swap(transport, rank, 0, torch.zeros(12, dtype=torch.uint8))
    except ConnectionError as error:
        transport.leave(error)
        return str(error)
    transport.leave(ValueError('the end'))
    return "accepted"


@pytest.mark.parametrize("size", [2**40, 5001, 0])
def test_no_memory_is_asked_for_what_cannot_be_a_message(size):
    said = run_processes(lying_size_worker, 2, size)[0]
    assert said.startswith("process 1 (peer 1, host not told) sent a message that announces")
    assert f"{size} bytes; allowed: 48 to 1052" in said


# -- what a round of one peer a process costs --------------------------------------------------------------------------

def sealing_worker(rank: int) -> tuple[int, int, bool, list[float]]:
    """Frames sealed and tables read anew in a third round, for whose messages there is room; whether the frame lies in the row; the
    row."""
    from dfl.transport import wire
    layout = make_layout([("q", 4, 8, 8, 2.0)], [("classifier.weight", (4, 4))])
    transport, x = cpu_transport(4), empty_rows(1, layout.size, before=FREE)
    x += torch.arange(layout.size) + rank
    transport.lend(x)
    heart = Gossip(build("lora", layout, head="mixed").method, layout, topologies.build("ring", 4), transport, [rank], x)
    heart.round(0, x)
    heart.round(1, x)
    seal, read, made, sizes, tables = frames.seal, wire._entries, [], [], []
    frames.seal = lambda frame, label: made.append(frame.data_ptr()) or sizes.append(len(frame)) or seal(frame, label)
    wire._entries = lambda *arguments: tables.append(0) or read(*arguments)
    heart.round(2, x)
    inside = made[0] < x.data_ptr() < made[0] + sizes[0]
    return len(made), len(tables), inside, x[0].tolist()


def test_a_row_is_sealed_once_for_all_neighbours_from_where_it_lies():
    found = run_processes(sealing_worker, 4)
    assert [one[:3] for one in found] == [(1, 0, True)] * 4
    w = topologies.build("ring", 4).matrix(0)
    np.testing.assert_allclose([one[3][0] for one in found], w @ w @ w @ np.arange(4), rtol=1e-6)  # the starts are 0 to 3
