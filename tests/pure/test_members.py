"""What a member of a run may be told by those that lie, are broken, or do not belong: they are put out by name, and it goes on."""

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dfl import config as configuration
from dfl.run.build import check
from dfl.run.joining import _where, differs
from dfl.transport import frames
from dfl.transport.hello import Admission
from dfl.transport.mail import Event, Life, RefusedError
from dfl.transport.members import FinishedError, Members
from dfl.transport.post import Post
from dfl.transport.view import Known, Member


def a_post(process: int, secret: bytes = b"", **about) -> Post:
    return Post(process, 3, secret=secret, about=about, check=lambda other, theirs: differs(about, theirs, other), patience=5.0,
                listen=("127.0.0.1", 0))


@pytest.fixture
def posts():
    made: list[Post] = []

    def make(*args, **kwargs) -> Post:
        made.append(a_post(*args, **kwargs))
        return made[-1]

    yield make
    for post in made:
        post.close()


def test_messages_arrive_in_order_and_a_closed_connection_is_noticed(posts):
    zero, one = posts(0), posts(1)
    assert one.connect(zero.book[0]) == 0
    for number in range(50):
        one.send(0, bytes([number]) * 1000 * number)
    assert [zero.events.get(timeout=5).data for _ in range(50)] == [bytes([number]) * 1000 * number for number in range(50)]
    one.close()
    assert zero.events.get(timeout=5)[:2] == ("gone", 1)


def test_who_leaves_with_something_unread_is_heard_to_the_end(posts):
    """The system throws away what such a connection has not sent when it closes, and the other end may read slowly."""
    zero, one = posts(0), posts(1)
    zero.life.hear = lambda process: time.sleep(0.01)
    one._read = lambda *args: None
    assert one.connect(zero.book[0]) == 0
    zero.send(1, b"unread")
    time.sleep(0.1)
    connection, last = one._lines[0].connection, b"the last" * 10**6
    one.send(0, last)
    one.flush(10)
    one.close()
    connection.close()
    assert zero.events.get(timeout=10).data == last


def test_nothing_is_on_the_way_through_a_closed_connection(posts):
    zero, one = posts(0), posts(1)
    one.connect(zero.book[0])
    line = one._lines[0]
    line.connection.close()
    assert line.arrived


def test_after_the_word_that_all_have_ended_nobody_is_missed(capsys):
    mail = Silence()
    members = Members(mail, 0, 3, timeout=5.0)
    members.ending = True
    for process in (1, 2):
        mail.events.put(Event("message", process, told(Known().with_joined(Member(process)))))
    mail.events.put(Event("message", 1, struct.pack("<BI", 6, 0)))
    mail.events.put(Event("gone", 1, text="its connection closed"))
    with pytest.raises(FinishedError):
        members.check()
    assert capsys.readouterr().err == ""


def test_an_announcement_of_200_gb_takes_no_memory_and_is_harm(posts):
    zero, one = posts(0), posts(1)
    one.connect(zero.book[0])
    one._lines[0].connection.sendall(struct.pack("<BQ", 2, 200 * 10**9))
    event = zero.events.get(timeout=5)
    assert event[:2] == ("harm", 1) and "announced 200000000000 bytes" in event.text


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"dfl": 1}\n', b"\xff" * 1000 + b"\n",
                                  b'{"dfl": 1, "nonce": 5, "process": 1, "instance": "x"}\n'])
def test_a_stranger_is_told_nothing_and_ends_nothing(posts, said):
    zero, one = posts(0), posts(1)
    with socket.create_connection(zero.book[0], timeout=10) as stranger:
        stranger.sendall(said)
        with contextlib.suppress(OSError):  # it may have been closed by now
            stranger.shutdown(socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ConnectionResetError):  # what it said was not read to the end
            while piece := stranger.recv(4096):
                heard += piece
    assert heard.count(b"\n") == 1 and set(json.loads(heard)) == {"dfl", "nonce", "process", "instance"}
    assert one.connect(zero.book[0]) == 0 and zero.events.empty()


def test_what_a_member_says_of_its_own_address_counts_more_than_what_others_say():
    admission, book = Admission(0, 4, b"", {}, lambda *_: ""), {0: ("here", 1)}
    admission.learn(book, 1, {"at": ("one", 1), "book": {"2": ("two", 2), "0": ("lie", 9), "7": ("nobody", 7)}})
    assert book == {0: ("here", 1), 1: ("one", 1), 2: ("two", 2)}
    admission.learn(book, 2, {"at": ("elsewhere", 3), "book": {"1": ("lie", 9), "3": ("three", 3)}})
    admission.learn(book, 1, {"at": ("one again", 4), "book": {"2": ("two", 2)}})
    assert book == {0: ("here", 1), 1: ("one again", 4), 2: ("elsewhere", 3), 3: ("three", 3)}


def test_who_has_another_secret_or_another_recipe_is_refused_by_name(posts):
    zero = posts(0, b"ours", lr=0.1)
    with pytest.raises(RefusedError, match="process 1 does not belong to this run: its DFL_SECRET is not that of process 0"):
        posts(1, b"theirs", lr=0.1).connect(zero.book[0])
    with pytest.raises(RefusedError, match="process 2 does not belong to this run: lr = '0.2' there, '0.1' here"):
        posts(2, b"ours", lr=0.2).connect(zero.book[0])


class Silence:
    """Mail in which a test puts events."""

    def __init__(self):
        self.events, self.waits, self.life, self.awaited, self.sent, self.out = queue.SimpleQueue(), {}, Life(5.0), (), [], []

    def connected(self):
        return [1, 2]

    def send(self, process, data):
        self.sent.append((process, data))

    def cut(self, process):
        self.out.append(process)

    def flush(self, seconds):
        pass

    def close(self):
        pass


def told(known: Known, info=None) -> bytes:
    return struct.pack("<BI", 3, 0) + json.dumps({"known": known.text(), "info": info, "again": False}).encode()


LIES = {"no message": b"\x01", "bad JSON": struct.pack("<BI", 3, 0) + b"{", "no table": struct.pack("<BI", 3, 0) + b"5",
        "another's name": struct.pack("<BI", 3, 7) + told(Known().with_joined(Member(1)))[5:],
        "an unknown member": told(Known().with_joined(Member(1), Member(9))), "an unknown kind": struct.pack("<BI", 99, 0),
        "all have ended": struct.pack("<BI", 6, 0), "half a frame": struct.pack("<BI", 4, 0) + b"half",
        "nonsense of itself": told(Known().with_joined(Member(1)), info=[1])}


@pytest.mark.parametrize("lie", LIES)
def test_a_member_that_lies_is_put_out_and_the_others_go_on(lie, capsys):
    mail = Silence()
    members = Members(mail, 0, 3, timeout=5.0)
    for process in (1, 2):
        mail.events.put(Event("message", process, told(Known().with_joined(Member(process)))))
    members._take(0.1)
    assert [member.process for member in members._settling.known.members()] == [0, 1, 2]
    mail.events.put(Event("message", 1, LIES[lie]))
    members._take(0.1)
    assert mail.out == [1] and [member.process for member in members._settling.known.members()] == [0, 2]
    said = capsys.readouterr().err
    assert said.startswith("dfl: going on without process 1: sent what no member sends") and "Traceback" not in said


@pytest.mark.parametrize("ticks", [0, 3])
def test_who_is_accused_by_a_liar_and_lives_is_waited_for(ticks):
    """Longer than it takes who is idle to answer: 1 is in the middle of a step; also where it has been quiet for a while."""
    mail = Silence()
    members = Members(mail, 0, 3, timeout=20.0)
    mail.connected = lambda: [1]  # 2 is cut off
    mail.life._quiet[1] = ticks * mail.life.tick
    mail.life.begin = lambda process: None
    known = Known().with_joined(Member(0), Member(1), Member(2))
    mail.events.put(Event("message", 1, told(known)))
    mail.events.put(Event("message", 2, told(known.accuse(Member(2), Member(1)))))
    mail.events.put(Event("harm", 2, text="lies"))
    answer = known.accuse(Member(2), Member(1)).accuse(Member(0), Member(2)).answered(Member(1))
    later = threading.Timer(1.0, lambda: mail.events.put(Event("message", 1, told(answer, {"at": 3}))))
    later.start()
    found = members.settle({"at": 3})
    assert found == {0: {"at": 3}, 1: {"at": 3}}
    assert [member.process for member in members.members] == [0, 1]


def test_who_is_accused_and_shows_no_life_is_not_waited_for():
    mail = Silence()
    members = Members(mail, 0, 3, timeout=20.0)
    mail.connected = lambda: [1, 2]
    mail.life._quiet[1] = 3 * mail.life.tick  # not long enough to be accused here as well
    mail.life.begin = lambda process: None
    known = Known().with_joined(Member(0), Member(1), Member(2)).accuse(Member(2), Member(1))
    for info in (None, {"at": 3}):
        mail.events.put(Event("message", 2, told(known, info)))
    begun = time.monotonic()
    assert members.settle({"at": 3}).keys() == {0, 2} and time.monotonic() < begun + mail.life.patience


def test_two_that_hold_each_other_for_gone_do_not_answer_each_other_for_ever():
    """As after a cut between two halves, both of which went on."""
    mail = Silence()
    members = Members(mail, 0, 3, timeout=5.0)
    members._settling.known = Known().with_joined(Member(0), Member(1))._replace(out=frozenset({Member(1)}))
    for _ in range(50):
        mail.events.put(Event("message", 1, told(Known().with_joined(Member(1)))))
    members._take(0.1)
    assert [process for process, data in mail.sent if data[0] == 3] == [1]


def test_a_gap_in_ones_own_time_is_nobodys_silence(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    life = Life(2.0)
    life.begin(1)
    for _ in range(4):
        now[0] += life.tick
        life.count()
    now[0] += 1000.0  # the machine was asleep
    life.count()
    assert not life.silent(1)
    for _ in range(8):
        now[0] += life.tick
        life.count()
    assert life.silent(1)
    life.hear(1)
    life.count()
    assert not life.silent(1)


STEP = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURMD_NODENAME": "gpu2"}


@pytest.mark.parametrize("env, where", [
    (STEP, (("", 0), "gpu2")), (STEP | {"SLURM_STEP_NUM_NODES": "1"}, (("127.0.0.1", 0), "127.0.0.1")),
    (STEP | {"SLURMD_NODENAME": "127.0.0.2"}, (("127.0.0.1", 0), "127.0.0.1")), ({}, (("127.0.0.1", 0), "127.0.0.1")),
    (STEP | {"DFL_LISTEN": "10.1.1.1:7000"}, (("", 7000), "10.1.1.1"))])
def test_a_task_on_several_nodes_listens_where_the_other_nodes_reach_it(env, where):
    assert _where(None, [], env) == where


@pytest.mark.parametrize("fields", [{"method": "lora", "wrapper": "gradient_tracking"}, {"delay": 1}, {"baseline": "local"},
                                    {"eval": {"patience": 2}}, {"checkpoint": {"best": True}}])
def test_what_cannot_go_on_without_a_part_of_its_peers_is_refused(fields):
    tree = {"membership": "survive", "device": "cpu", **fields}
    with pytest.raises(ValueError, match="membership.mode = 'survive': "):
        check(configuration.from_dict(tree))
    check(configuration.from_dict({**tree, "membership": "fixed"}))


def test_where_zenoh_is_not_installed_a_recipe_with_it_is_refused(monkeypatch):
    from dfl.transport import zenoh_session
    config = configuration.from_dict({"membership": {"mode": "survive", "transport": "zenoh"}, "method": "lora", "device": "cpu"})
    monkeypatch.setattr(zenoh_session.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"transport = 'zenoh' needs the package eclipse-zenoh: pip install 'dfl\[zenoh\]'"):
        check(config)


class Changing:
    """Whom a process waits for, as its main thread changes it between any two looks of another thread."""

    def __init__(self):
        self.looks = 0

    def __get__(self, mail, owner):
        self.looks += 1
        return (1, 2)[:self.looks % 3]

    def __set__(self, mail, value):
        pass


def test_signs_of_life_go_on_while_the_main_thread_changes_whom_it_waits_for(posts, monkeypatch):
    zero, one = posts(0), posts(1)
    monkeypatch.setattr(type(one), "awaited", Changing(), raising=False)
    ticks = iter([False] * 5)
    monkeypatch.setattr(one._ended, "wait", lambda seconds: next(ticks, True))
    one.connect(zero.book[0])
    Post._show_life(one)
    one.send(0, b"behind them")
    assert zero.events.get(timeout=5).data == b"behind them"


def test_another_connection_may_tell_an_address_while_one_is_told_all(posts):
    class Told(dict):
        """As if another thread added to it at each step through it."""

        def items(self):
            for key in list(super().items()):
                yield key
                self[7] = ("late", 7)
                if len(list(self)) > size:
                    raise RuntimeError("dictionary changed size during iteration")

    zero, one = posts(0), posts(1)
    zero.book = Told(zero.book)
    size = len(zero.book)
    assert one.connect(zero.book[0]) == 0


def test_who_has_too_many_files_open_for_a_moment_lets_others_in_later(posts, monkeypatch):
    zero, asked = posts(0), []

    class Full:
        def accept(self):
            asked.append(1)
            if len(asked) == 2:
                zero._ended.set()
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(zero, "_ended", threading.Event())
    monkeypatch.setattr(zero, "_socket", Full())
    zero._accept()
    assert len(asked) == 2


@pytest.mark.parametrize("said", [b'{"refused": "no"}\n', b"[]\n"])
def test_an_address_where_somebody_else_answers_is_called_again(posts, said, monkeypatch):
    """Its process may only be about to begin."""
    one = posts(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()
        for _ in range(2):
            one._dialer._next.pop(address, None) if one._dialer._next.get(address, 0.0) != float("inf") else None
            one._dialer.call([address])
            other.settimeout(5)
            connection, _ = other.accept()
            with connection:
                connection.sendall(said)
            deadline = time.monotonic() + 5
            while one._dialer._next[address] == float("inf"):
                assert time.monotonic() < deadline
                time.sleep(0.005)


@pytest.mark.parametrize("what", ["a step", "settling"])
def test_a_job_that_was_suspended_for_longer_than_the_time_out_holds_nobody_for_late(what, monkeypatch, capsys):
    """All of its processes were: who goes on first is no judge of the others."""
    now, mail = [1000.0], Silence()
    monkeypatch.setattr("dfl.transport.members.time", SimpleNamespace(monotonic=lambda: now[0]))
    members = Members(mail, 0, 2, timeout=20.0)
    members.connect = members._look_for_lost = lambda: None
    known = Known().with_joined(Member(0), Member(1))
    mail.events.put(Event("message", 1, told(known)))
    members._take(0.0)
    members.members, members._changed = known.members(), False
    late = iter([told(known, {"at": 3}) if what == "settling" else struct.pack("<BI8sQ", 4, 0, b"", 1) + bytes(frames.HEADER)])
    take, looks = members._take, iter(range(10**6))

    def suspended(seconds: float) -> None:
        look = next(looks)
        now[0] += 1000.0 if look == 1 else 1.0
        if look == 6:
            mail.events.put(Event("message", 1, next(late)))
        take(0.0)

    members._take = suspended
    if what == "settling":
        assert members.settle({"at": 3}) == {0: {"at": 3}, 1: {"at": 3}}
    else:
        members._view = bytes(8)
        step = members.begin({}, {1: torch.zeros(frames.HEADER, dtype=torch.uint8)})
        assert members.end(step, now[0] + 20.0, None, None) == ([], False)
    assert capsys.readouterr().err == ""
