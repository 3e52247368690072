"""One scenario for every transport: what arrives, what it costs, what is refused."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

import topologies
from dfl import codecs, rules
from dfl.factors import empty_rows, make_layout
from dfl.gossip import gossip
from dfl.transport import Distributed, InProcess, edges_of, frames, hosting

pytestmark = pytest.mark.distributed
NUM_PEERS, ROUNDS = 7, 6
LAYOUT = make_layout([("q", 3, 8, 6, 2.0), ("v", 3, 8, 6, 2.0), ("o", 2, 5, 9, 0.5)], [("classifier.weight", (4, 5))])


def graph():
    """Sparse and changing; in most rounds somebody is alone."""
    return topologies.build("edge_activation", NUM_PEERS, p=0.15, base="complete", seed=3)


def start_rows() -> torch.Tensor:
    x = empty_rows(NUM_PEERS, LAYOUT.size)
    return x.copy_(torch.randn(NUM_PEERS, LAYOUT.size, generator=torch.Generator().manual_seed(0)))


def cpu_transport(num_peers: int = NUM_PEERS, **options) -> Distributed:
    return Distributed(num_peers, device=torch.device("cpu"), wire=torch.device("cpu"), **options)


def mix_rounds(transport, hosted, rule_name: str, codec: str, params: dict) -> torch.Tensor:
    rule, wire = rules.build(rule_name, LAYOUT, **params), codecs.build(codec)
    x = empty_rows(len(hosted), LAYOUT.size)
    x.copy_(start_rows()[list(hosted)])
    states = [rule.init(row) for row in x]
    for t in range(ROUNDS):
        gossip(rule, wire, transport, x, hosted, states, graph().matrix(t), t)
    return x


def gossip_worker(rank: int, *args) -> tuple:
    transport = cpu_transport()
    x = mix_rounds(transport, transport.hosted, *args)
    gathered = transport.gather(x)
    return transport.wire_bytes, None if gathered is None else gathered.numpy()


RULES = {"lora": {}, "ffa": {}, "rolora": {}, "adf": {"T": 2}, "tad": {"T": 3}, "local": {}, "decaf": {}}


@pytest.mark.parametrize("head", ["frozen", "mixed", "local"])
@pytest.mark.parametrize("name", RULES)
def test_hosting_does_not_matter(name, head):
    params = RULES[name] | {"head": head}
    alone = mix_rounds(InProcess(), range(NUM_PEERS), name, "none", params).numpy()
    for num_processes in (2, 3):
        (_, together), *_ = run_processes(gossip_worker, num_processes, name, "none", params)
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("name", [name for name in RULES if name != "decaf"])
def test_learning_rate_zero_is_the_product_of_the_matrices(name):
    rule = rules.build(name, LAYOUT, **RULES[name], head="mixed")
    expected = start_rows().double().numpy()
    alone_somewhere = False
    for t in range(ROUNDS):
        w = graph().matrix(t)
        alone_somewhere |= bool((np.diag(w) == 1).any())
        for cut in LAYOUT.columns(rule.sends(t)):
            expected[:, cut] = w @ expected[:, cut]
    assert alone_somewhere
    (_, got), *_ = run_processes(gossip_worker, 4, name, "none", RULES[name] | {"head": "mixed"})
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_bytes_are_what_the_edges_need(codec):
    results = run_processes(gossip_worker, 3, "lora", codec, {})
    hosts = hosting(NUM_PEERS, 3)
    size = codecs.build(codec).size(rules.build("lora", LAYOUT).length(0), torch.float32)
    expected = 0
    for t in range(ROUNDS):
        pairs = {}  # a message travels once to a process, however many of its peers hear it
        for sender, receiver in edges_of(graph().matrix(t)):
            a, b = ([p for p, peers in enumerate(hosts) if peer in peers][0] for peer in (sender, receiver))
            if a != b:
                pairs.setdefault((a, b), set()).add(sender)
        expected += sum(frames.HEADER + 16 * len(senders) + len(senders) * size for senders in pairs.values())
    assert sum(sent for sent, _ in results) == expected


@pytest.mark.parametrize("codec, error", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_wire_precision_is_bounded(codec, error):
    exact = mix_rounds(InProcess(), range(NUM_PEERS), "lora", "none", {})
    rounded = mix_rounds(InProcess(), range(NUM_PEERS), "lora", codec, {})
    assert 0 < (exact - rounded).abs().max() < error * ROUNDS
    assert (exact.mean(0) - rounded.mean(0)).abs().max() < error * ROUNDS


def foreign_worker(rank: int, field: str) -> str:
    """Process 1 sends what process 0 must refuse."""
    transport = cpu_transport(2, run=7 + (rank if field == "run" else 0))
    t = rank if field == "round" else 0
    size = 12
    if field == "peers":
        pack = transport._pack
        transport._pack = lambda t, outbox, peers, *rest: pack(t, {1 + p: m for p, m in outbox.items()}, [1 + p for p in peers], *rest)
    try:
        transport.exchange(t, {rank: torch.zeros(size, dtype=torch.uint8)}, [(0, 1), (1, 0)], size)
    except ConnectionError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("field", ["run", "round", "peers"])
def test_a_message_that_does_not_belong_is_refused(field):
    said = run_processes(foreign_worker, 2, field)[0]
    assert said.startswith("process 1 (peer 1, ") and " sent " in said and field in said


def tag_worker(rank: int, tags: tuple[int, int]) -> str:
    try:
        cpu_transport(2).exchange(3, {rank: torch.zeros(12, dtype=torch.uint8)}, [(0, 1), (1, 0)], 12, tag=tags[rank])
    except TypeError as error:
        return str(error)
    return "accepted"


def test_a_message_of_another_kind_is_refused_and_names_both_processes():
    assert run_processes(tag_worker, 2, (2**32 - 1, 2**32 - 1)) == ["accepted", "accepted"]
    said = run_processes(tag_worker, 2, (0, 7))
    assert "process 1 (peer 1, host not told) sent peer 1's message with tag 0x7 in round 4; process 0 expected 0x0" in said[0]
    assert "process 0 (peer 0, host not told) sent peer 0's message with tag 0x0 in round 4; process 1 expected 0x7" in said[1]


def announce_worker(rank: int) -> tuple:
    """Peer j sends j * 5 + 1 bytes of value j."""
    transport = cpu_transport()
    outbox = {peer: torch.full((peer * 5 + 1,), peer, dtype=torch.uint8) for peer in transport.hosted}
    inboxes = transport.exchange(0, outbox, edges_of(graph().matrix(1)), None)
    return {peer: {j: m.tolist() for j, m in inbox.items()} for peer, inbox in inboxes.items()}


def test_messages_of_different_sizes_are_announced():
    edges = edges_of(graph().matrix(1))
    assert len({sender for sender, _ in edges}) > 2
    expected = {peer: {} for peer in range(NUM_PEERS)}
    for sender, receiver in edges:
        expected[receiver][sender] = [sender] * (sender * 5 + 1)
    found = {}
    for part in run_processes(announce_worker, 3):
        found |= part
    assert found == expected


def agree_worker(rank: int) -> tuple:
    transport = cpu_transport()
    rows = torch.full((len(transport.hosted), 2), float(rank))
    gathered = transport.gather(rows)
    return transport.agree(5 if rank == 1 else 2), None if gathered is None else gathered[:, 0].tolist()


def test_processes_agree_and_gather_in_peer_order():
    results = run_processes(agree_worker, 3)
    assert [agreed for agreed, _ in results] == [5, 5, 5]
    assert results[0][1] == [0, 0, 0, 1, 1, 2, 2] and results[1][1] is None


def test_hosting_is_even_and_refuses_more_processes_than_peers():
    assert [list(r) for r in hosting(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match="peers = 3 is fewer than the 4 processes"):
        hosting(3, 4)


# -- a process that speaks the wire format and lies --------------------------------------------------------------------

LIES = {"cut": lambda frame: frame[:-8].clone(),  # what lies behind it in the receiver's buffer is from the round before
        "long": lambda frame: torch.cat([frame, frame[:16]]), "twice": lambda frame: torch.cat([frame, frame]),
        "empty": lambda frame: frame[:0].clone(), "old": lambda frame: frame[:frames.HEADER].clone(),
        "changed": lambda frame: torch.cat([frame[:-1], frame[-1:] ^ 1]),
        "header": lambda frame: torch.cat([frame[:12] ^ 1, frame[12:]])}
SAID = {"cut": "digest is not that of its 152 bytes", "long": "longer than it says (152 bytes)", "twice": "longer than it says",
        "empty": "with round = 1; expected 2", "old": "digest is not that of its 152 bytes", "changed": "digest is not that of",
        "header": "magic"}


def lying_worker(rank: int) -> dict[str, str]:
    """What process 0 says to each lie of process 1 in a second round. An honest round comes first."""
    said = {}
    for lie, change in LIES.items():
        transport = cpu_transport(2, run=7)
        pack, said[lie] = transport._pack, "accepted"
        for t in (0, 1):
            if rank == 1 and t == 1:
                transport._pack = lambda *given, pack=pack, change=change: change(pack(*given))
            message = torch.arange(88, dtype=torch.uint8) + 100 * t + rank
            try:
                inbox = transport.exchange(t, {rank: message}, [(0, 1), (1, 0)], 88)[rank]
                assert inbox[1 - rank].tolist() == (torch.arange(88, dtype=torch.uint8) + 100 * t + 1 - rank).tolist()
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
    transfer = transport._transfer
    if rank == 1:
        transport._transfer = lambda what, sent, *rest: transfer(what, {q: t.fill_(size) for q, t in sent.items()}, *rest)
    try:
        transport.exchange(0, {rank: torch.zeros(12, dtype=torch.uint8)}, [(0, 1), (1, 0)], None)
    except ConnectionError as error:
        dist.destroy_process_group()
        return str(error)
    return "accepted"


@pytest.mark.parametrize("size", [2**40, 1001, -1])
def test_no_memory_is_asked_for_what_cannot_be_a_message(size):
    said = run_processes(lying_size_worker, 2, size)[0]
    assert said.startswith(f"process 1 (peer 1, host not told) announced {size} bytes in round 1; allowed: up to 1000")
