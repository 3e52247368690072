"""The mix of rules that only average: the bits of the plain sum, each number read and written once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import topologies
from dfl import methods
from dfl.adapters.layout import empty_rows, make_layout
from dfl.codecs.rounding import none
from dfl.engine import averaging
from dfl.engine.averaging import Averaging
from dfl.engine.gossip import Gossip
from dfl.engine.messages import norms
from dfl.rules.base import mean_of_groups, parts_of
from dfl.slots import Message, Round
from dfl.transport import InProcess
from dfl.transport.packet import Packet

GROUPS = ("A", "B", "head")
SMALL = make_layout([("layer", 4, 40, 40, 1.0)], [("head", (16,))])


def rows_in(layout, num: int, seed: int = 0) -> torch.Tensor:
    x = empty_rows(num, layout.size)
    return x.copy_(torch.randn(num, layout.size, generator=torch.Generator().manual_seed(seed)))


def plain(layout, x, groups, inboxes, weights) -> torch.Tensor:
    new = x.clone()
    for row, inbox in inboxes.items():
        mean_of_groups(new[row], layout, groups, inbox, Round(0, row, weights[row]))
    return new


@pytest.mark.parametrize("groups", [GROUPS, ("B",), ("A", "head")])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("width", [37, 12_001])  # one block, and several with an end of its own
def test_sums_written_in_place_have_the_bits_of_sums_in_new_rows(groups, num, width, monkeypatch):
    monkeypatch.setattr(averaging, "ONE", 2**13)
    monkeypatch.setattr(averaging, "SEVERAL", 2**13)
    monkeypatch.setattr(averaging, "LEAST", 2**11)
    layout = make_layout([("layer", 3, width, width + 1, 1.0)], [("head", (width // 3,))])
    x, others = rows_in(layout, num), rows_in(layout, 2, seed=1)
    parts = [parts_of(row, layout, GROUPS) for row in (*x, *others)]
    messages = [Message(held if k % 2 else {name: part.clone() for name, part in held.items()}) for k, held in enumerate(parts)]
    inboxes = {row: {0: messages[num], 1: messages[row], 2: messages[(row + 1) % num], 5: messages[-1]} for row in range(num)}
    weights = {row: {0: 0.3, 1: 0.4 - 0.01 * row, 2: 0.1, 5: 0.2 + 0.01 * row} for row in range(num)}
    wanted = plain(layout, x, groups, inboxes, weights)
    Averaging(layout)(x, groups, {row: averaging.terms_of(inboxes[row], Round(0, row, weights[row])) for row in inboxes})
    assert torch.equal(x, wanted) and not torch.equal(x, rows_in(layout, num))


def test_rows_that_take_no_part_stay():
    layout = make_layout([("layer", 2, 5, 6, 1.0)])
    x = rows_in(layout, 3)
    before = x.clone()
    message = Message(parts_of(rows_in(layout, 1, seed=1)[0], layout, GROUPS))
    Averaging(layout)(x, GROUPS, {1: averaging.terms_of({0: message}, Round(0, 1, {0: 1.0}))})
    assert torch.equal(x[[0, 2]], before[[0, 2]]) and torch.equal(x[1, layout.groups["A"]], message.parts["A"])
    Averaging(layout)(x, GROUPS, {})
    assert torch.equal(x[[0, 2]], before[[0, 2]])


class Calls(TorchDispatchMode):
    """What is computed inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


def test_a_round_of_one_peer_asks_for_no_row_of_memory_and_writes_each_number_once():
    x = rows_in(SMALL, 1)
    gossip = Gossip(methods.build("lora", methods.Context(SMALL, head="mixed")), SMALL, topologies.build("ring", 3),
                    Told(rows_in(SMALL, 3)), [1], x)
    gossip.round(0, x)
    with Calls() as calls:
        gossip.round(1, x)
    assert [name for name in calls.names if name in ("mul", "add", "add_")] == ["mul", "add_", "add"], calls.names
    assert not {"copy_", "clone", "empty", "empty_like"} & {*calls.names}, calls.names
    assert calls.names.count("linalg_vector_norm") == 9, "a norm of each part of each of the three messages, once"


class Told(InProcess):
    """Every neighbour says its row of `rows`, in the same packets in every round."""

    def __init__(self, rows: torch.Tensor):
        self.packets = {}
        for peer, row in enumerate(rows):
            parts = parts_of(row, SMALL, GROUPS)
            self.packets[peer] = Packet(none().encode(parts, {}, None)[0], {name: part.numel() for name, part in parts.items()}, {})

    def exchange(self, t, packets, addressed, due, expected, what="exchange"):
        return {peer: {j: self.packets[j] for j in senders} for peer, senders in expected.items()}


def test_hosted_peers_are_looked_at_once():
    """What a peer said and what others in its process take it for are the same numbers, and the rows lie at equal distances: one
    call for each part."""
    layout = make_layout([("layer", 4, 40, 40, 1.0)])
    x = rows_in(layout, 6)
    gossip = Gossip(methods.build("lora", methods.Context(layout)), layout, topologies.build("ring", 6), InProcess(), range(6), x)
    with Calls() as calls:
        gossip.round(0, x)
    assert calls.names.count("linalg_vector_norm") == 2, calls.names


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("length", [5, 16, 1003])
def test_norms_of_rows_in_one_call_have_the_bits_of_norms_one_by_one(num, length):
    rows = empty_rows(num, length).copy_(torch.randn(num, length, generator=torch.Generator().manual_seed(0)))
    alone = [float(torch.linalg.vector_norm(row.clone())) for row in rows]
    assert [found["x"] for found in norms([Message({"x": row}) for row in rows])] == alone
    assert [found["x"] for found in norms([Message({"x": row.clone()}) for row in rows])] == alone
    rows[-1, 0] = 1e30
    told = norms([Message({"x": row}) for row in (*rows, torch.tensor([torch.nan]))])
    assert told[num - 1]["x"] == pytest.approx(1e30) and told[num]["x"] != told[num]["x"]


def test_parts_of_other_memory_are_not_taken_for_neighbours():
    whole = torch.arange(12.0)
    joined = averaging._joined(("A", "B"), [{"A": whole[:4], "B": whole[4:12]}])
    assert next(iter(joined.values())).tolist() == whole.tolist()
    assert not averaging._joined(("A", "B"), [{"A": whole[:4], "B": whole[5:12]}])
    assert not averaging._joined(("A", "B"), [{"A": whole[:4], "B": whole.clone()[4:12]}])
