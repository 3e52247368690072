"""What is counted of a round: closed forms, by peer."""

import documents
import pytest
import torch
from cases import NUM, Case, start_rows

from dfl.methods import Choice
from dfl.slots import bits_of
from dfl.transport.ledger import Ledger, bytes_of, together, total
from dfl.transport.packet import Packet


def reports(name: str, rounds: int = 1, x=None, **slots):
    case = Case(name, slots={slot: Choice(*choice) for slot, choice in slots.items()})
    x = start_rows(case) if x is None else x
    heart = case.gossip(x)
    return case, [heart.round(t, x, lr=0.01, local_steps=2) for t in range(rounds)]


def test_a_ring_that_always_sends():
    """Four peers of degree two: D numbers of four bytes to each neighbour."""
    case, [report] = reports("lora")
    size = case.layout.size
    assert report.ledger == {peer: Ledger(messages=2, broadcasts=1, payload_bytes=8 * size, channel_uses=size, due=2, rounds=1)
                             for peer in range(NUM)}
    assert (report.messages, report.broadcasts, report.message_bytes) == (8, 4, 32 * size)
    assert total(report.ledger) == Ledger(8, 4, 32 * size, 0, 0, 4 * size, 0.0, 8, 1)


def test_bytes_of_a_codec_and_numbers_on_the_way():
    case, [report] = reports("lora", codec=("bfloat16",))
    size = case.layout.size
    assert report.ledger[0].payload_bytes == 2 * 2 * size and report.ledger[0].channel_uses == size


def test_integers_are_headers_or_say_which_numbers_are_sent():
    """fedhl tells the rank of both layers; lora_a2 which slots it sends: as many as it keeps."""
    _, [report] = reports("fedhl")
    assert report.ledger[0].header_bytes == 2 * 2 * 8 and report.ledger[0].index_bytes == 0
    _, [report] = reports("lora_a2")
    found = report.ledger[0]
    assert (found.header_bytes, found.index_bytes) == (0, 2 * 8)  # one slot of the four
    _, [other] = reports("ffa")
    assert other.ledger[0].header_bytes == 2 * 8  # the digest of the frozen factors
    assert found.total_bytes == found.payload_bytes + found.header_bytes + found.index_bytes == report.message_bytes // NUM


def test_who_is_silent_sends_nothing():
    _, found = reports("lora", 3, trigger=("event", {"threshold": 1e9, "decay": "constant"}))
    assert [report.ledger[0].rounds for report in found] == [1, 0, 0]
    assert found[1].ledger[0] == Ledger(due=2)


@pytest.mark.parametrize("trigger", [("event", {"threshold": 0.1}), ("efhc", {"r": 0.1, "bandwidth": 1.0}), ("periodic", {"every": 3}),
                                     ("late", {"share": 0.5}), ("eventgrad", {"initial": 1})])
def test_what_would_have_been_sent_is_what_the_run_without_the_trigger_sends(trigger):
    """Also in rounds in which nobody speaks, and where all merge."""
    _, plain = reports("lora", 7)
    _, found = reports("lora", 7, trigger=trigger)
    always = sum(report.messages for report in plain)
    assert sum(total(report.ledger).due for report in found) == always == sum(total(report.ledger).due for report in plain)


def test_totals_over_rounds_and_peers():
    one, two = Ledger(2, 1, 10, 1, 3, 5, 0.5, 2, 1, 2.0), Ledger(1, 1, 7, 0, 0, 2, 0.0, 2, 1, 3.0)
    both = together({0: one}, {0: two, 1: two})
    assert both == {0: Ledger(3, 2, 17, 1, 3, 7, 0.5, 4, 2, 3.0), 1: two}
    assert (total(both).seconds, total(both).rounds, total(both).messages) == (3.0, 2, 4)


def test_the_time_of_a_packet_is_no_part_of_its_message():
    meta = {"clock": bits_of(torch.tensor(1.0)), "ranks": torch.tensor([1, 2])}
    packet = Packet({"A": torch.zeros(6, dtype=torch.uint8)}, {"A": 6}, meta)
    assert bytes_of(packet) == 6 + 16


@pytest.mark.parametrize("name", ["lora", "ffa", "decaf"])
def test_a_peer_is_counted_wherever_it_is_hosted(name):
    """By peer, and the totals are those of all."""
    _, [report] = reports(name)
    assert sorted(report.ledger) == list(range(NUM))
    assert report.messages == sum(one.messages for one in report.ledger.values())
    assert report.message_bytes == sum(one.total_bytes for one in report.ledger.values())


def test_the_example_of_the_document(capsys):
    """It saves what it says to save, at the same disagreement but for a little."""
    exec(documents.block("python", "messages saved"), {})
    always, event = capsys.readouterr().out.splitlines()
    assert always.startswith("0% of 960 messages saved")
    saved, apart = int(event.split("%")[0]), [float(line.split()[-1]) for line in (always, event)]
    assert 20 <= saved < 100 and apart[1] < 2 * apart[0] + 0.5
