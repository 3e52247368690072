"""The carrier over zenoh, in one process: order, ends of connections, and what is kept from those that lie or do not belong."""

import contextlib
import json
import queue
import time

import pytest

from dfl import config as configuration
from dfl.run.build import check
from dfl.run.joining import differs, make
from dfl.run.runtime import Place
from dfl.transport import certificates
from dfl.transport.mail import Event

zenoh = pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install 'dfl[zenoh]'")

from dfl.transport import zenoh_line, zenoh_session  # noqa: E402
from dfl.transport.zenoh_line import HEAD, Line  # noqa: E402
from dfl.transport.zenoh_mail import ZenohMail, _Seen  # noqa: E402
from dfl.transport.zenoh_session import alive_key, key_of, open_session  # noqa: E402


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        certificates.make(folder / name / "certificates", 4)
    return folder


def identity(keys, process, whose="ours") -> certificates.Identity:
    return certificates.identity_of(keys / whose / "certificates", process)


@pytest.fixture
def mails(keys):
    made: list[ZenohMail] = []

    def make(process: int, secret: bytes = b"", tls: bool = True, **about) -> ZenohMail:
        """It knows the address of the first one."""
        made.append(ZenohMail(process, 3, secret=secret, about=about, check=lambda other, theirs: differs(about, theirs, other),
                              patience=4.0, identity=identity(keys, process) if tls else None))
        made[-1].meet([one.book[one.process] for one in made[:1]])
        return made[-1]

    yield make
    for mail in made:
        mail.close()


def until(true, seconds: float = 10.0) -> None:
    """The time is a limit and not what is tested."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def meet(*mails: ZenohMail) -> None:
    until(lambda: all(len(mail.connected()) == len(mails) - 1 for mail in mails))


def nothing_comes(mail: ZenohMail, *others: ZenohMail) -> None:
    """What was sent to a mail before has come by the time that a later message from each of the others has."""
    for other in others:
        other.send(mail.process, b"later")
    assert [mail.events.get(timeout=5)[0::2] for _ in others] == [("message", b"later")] * len(others)


@pytest.mark.parametrize("tls", [True, False])
def test_all_find_each_other_from_one_address_and_messages_arrive_in_order(mails, tls):
    zero, one, two = (mails(process, tls=tls) for process in range(3))
    meet(zero, one, two)
    sent = [bytes([number]) * 100_000 * number for number in range(40)]
    for data in sent:
        one.send(2, data)
    one.flush(10.0)
    one.close()  # nothing is lost of what was flushed
    assert [two.events.get(timeout=5).data for _ in sent] == sent
    assert two.events.get(timeout=5)[:2] == zero.events.get(timeout=5)[:2] == ("gone", 1)


def test_who_knows_one_address_is_led_to_the_others_by_what_that_one_tells(mails, monkeypatch):
    """zenoh's own way of finding them is off, as it does not lead back to those that were lost."""
    settings = zenoh_session.settings
    monkeypatch.setattr(zenoh_session, "settings", lambda *args: settings(*args) | {"scouting/gossip/enabled": False})
    zero, one, two = (mails(process) for process in range(3))
    meet(zero, one, two)
    sent = [bytes([number]) * 1_000_000 for number in range(10)]
    for data in sent:
        one.send(2, data)
        two.send(1, data)
    assert [two.events.get(timeout=5).data for _ in sent] == [one.events.get(timeout=5).data for _ in sent] == sent
    assert one.book == two.book
    port = one.book[1][1]
    one.close()
    assert two.events.get(timeout=5)[:2] == ("gone", 1)
    again = ZenohMail(1, 3, secret=b"", about={}, check=lambda *_: "", patience=4.0, listen=("127.0.0.1", port), identity=one.identity)
    try:
        again.meet([zero.book[0]])
        meet(zero, two, again)
    finally:
        again.close()


def test_who_is_cut_off_notices_and_what_it_had_under_way_is_not_read(mails):
    zero, one = mails(0), mails(1)
    meet(zero, one)
    old = zero._lines[1].mine
    zero.cut(1)
    assert one.events.get(timeout=5)[:2] == ("gone", 0)
    meet(zero, one)
    one._session.put(key_of(0, 1), HEAD.pack(zenoh_line.PIECE, old, 1, 3) + b"old")
    nothing_comes(zero, one)


def test_a_hello_of_an_ended_connection_that_comes_late_changes_nothing(mails):
    """Each connection has a writer of its own, so that the old one's last hello may arrive behind the new one's first."""
    zero, one = mails(0), mails(1)
    meet(zero, one)
    old = zero._hello(zero._lines[1])
    zero.cut(1)
    assert one.events.get(timeout=5)[:2] == ("gone", 0)
    meet(zero, one)
    now = zero._lines[1].mine, one._lines[0].mine
    for _ in range(3):
        zero._session.put(key_of(1, 0), old)
    nothing_comes(one, zero)
    assert (zero._lines[1].mine, one._lines[0].mine) == now


def test_two_whose_beginnings_cross_meet(mails):
    """A connection that is not ready takes the other's new name; if it began once more, the other would do so then as well."""
    zero, one = mails(0), mails(1)
    meet(zero, one)
    never = Line(zero._session, key_of(1, 0), one._start, next(zero._numbers), 0)  # this one is not kept
    zero._session.put(key_of(1, 0), zero._hello(never))
    never.close()
    assert one.events.get(timeout=5)[:2] == ("gone", 0) and zero.events.get(timeout=5)[:2] == ("gone", 1)
    meet(zero, one)
    nothing_comes(one, zero)


def test_a_hello_to_an_earlier_start_of_a_process_is_no_reason_to_refuse_who_says_it(mails):
    """Who has not learnt yet that a process was started again proves to the earlier start that it knows the secret."""
    zero, one = mails(0), mails(1)
    meet(zero, one)
    late = Line(one._session, key_of(0, 1), "an earlier start", next(one._numbers), 0)
    one._session.put(key_of(0, 1), one._hello(late))
    late.close()
    nothing_comes(zero, one)
    assert zero.connected() == [1] and one.connected() == [0] and not one.refusals


def test_a_late_hello_of_an_earlier_start_of_a_process_leaves_nobody_waiting_for_ever(mails):
    """It comes over another link than the news of the later start, so that these may overtake it."""
    zero, one = mails(0), mails(1)
    meet(zero, one)
    with zero._lock:
        now, zero._start = zero._start, "an earlier start"
        late, zero._start = zero._hello(zero._lines[1]), now
    one._seen.put(_Seen(0, data=late))
    one._seen.put(_Seen(0, "an earlier start", False))  # and then its token goes
    assert one.events.get(timeout=5)[:2] == ("gone", 0)
    meet(zero, one)
    until(lambda: one._lines[0].start == zero._start)
    zero.send(1, b"here")
    until(lambda: zero.connected() == [1] and zero.send(1, b"here") is None and one.events.qsize() > 0)


HARM = {"200 GB": lambda line: HEAD.pack(zenoh_line.PIECE, line, 1, 200 * 10**9) + b"x",
        "a piece is missing": lambda line: HEAD.pack(zenoh_line.PIECE, line, 5, 1) + b"x",
        "more than announced": lambda line: HEAD.pack(zenoh_line.PIECE, line, 1, 1) + b"xx",
        "an empty piece": lambda line: HEAD.pack(zenoh_line.PIECE, line, 1, 7),
        "an unknown kind": lambda line: HEAD.pack(77, line, 1, 0),
        "too many awaited": lambda line: HEAD.pack(zenoh_line.LIFE, line, 1, 8 * 5000) + bytes(8 * 5000),
        "half a head": lambda line: b"\x04",
        "a hello that is none": lambda line: HEAD.pack(zenoh_line.HELLO, line, 0, 0) + b"{",
        "a deep hello": lambda line: HEAD.pack(zenoh_line.HELLO, line, 0, 0) + b"[" * 100_000,
        "a hello without parts": lambda line: HEAD.pack(zenoh_line.HELLO, line, 0, 0) + b'{"line": 5}'}


@pytest.mark.parametrize("what", HARM)
def test_a_member_that_sends_what_none_sends_is_named_and_its_connection_begins_anew(mails, what):
    zero, one, two = mails(0), mails(1), mails(2)
    meet(zero, one, two)
    before = zero._lines[1].mine
    one._session.put(key_of(0, 1), HARM[what](before))
    assert zero.events.get(timeout=5)[:2] == ("harm", 1)
    assert zero._lines[1].mine != before
    nothing_comes(zero, two)


def receiver(into: queue.SimpleQueue):
    return zenoh.handlers.Callback(lambda sample: into.put(str(sample.key_expr)), indirect=False)


def taken(from_queue: queue.SimpleQueue) -> set[str]:
    return {from_queue.get() for _ in range(from_queue.qsize())}


def test_who_writes_under_anothers_name_or_listens_to_it_is_refused(mails, keys):
    """Process 1, with its own certificate, as process 2. What it does under its own name arrives, which shows that it could."""
    zero, two = mails(0), mails(2)
    meet(zero, two)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    with open_session(("127.0.0.1", 0), [zero.book[0]], 3, 4.0, identity(keys, 1)) as liar:
        for key in (key_of(2, "*"), key_of("*", "*"), "**", key_of(1, "*")):
            liar.declare_subscriber(key, receiver(heard))
        until(lambda: "process-1" in {link.auth_identifier for link in zero._session.info.links()})
        token = liar.liveliness().declare_token(alive_key(2, "another start"))
        own = liar.liveliness().declare_token(alive_key(1, "its start"))
        until(lambda: 1 in zero._lines and 1 in two._lines and not heard.empty())  # and both say hello to it
        liar.put(key_of(0, 2), HEAD.pack(zenoh_line.PIECE, zero._lines[2].mine, 1, 4) + b"lies")
        liar.put("dfl/anything", b"else")
        liar.delete(key_of(0, 2))
        nothing_comes(zero, two)  # neither a message of 2, nor its end, nor another start of it
        nothing_comes(two, zero)
        assert zero._lines[2].start == two._start
        token.undeclare()
        own.undeclare()
    assert taken(heard) <= {key_of(1, 0), key_of(1, 2), key_of(0, 2), "dfl/anything"}  # for it, and what it wrote itself


@pytest.mark.parametrize("whose", ["its own", "nobody's", "another run's", "one that is not in the run"])
def test_a_client_without_a_certificate_of_the_run_gets_nothing_and_says_nothing(mails, keys, whose):
    zero, one = mails(0), mails(1)
    meet(zero, one)
    shown = {"its own": identity(keys, 2), "another run's": identity(keys, 2, "theirs"),
             "one that is not in the run": identity(keys, 3)}
    tls = {"root_ca_certificate": str(identity(keys, 2).authority), "verify_name_on_connect": False}
    if whose in shown:
        _, certificate, key = map(str, shown[whose])
        tls |= {"enable_mtls": True, "connect_certificate": certificate, "connect_private_key": key}
    config = zenoh.Config()
    for name, value in {"mode": "client", "scouting/multicast/enabled": False, "connect/timeout_ms": 1000,
                        "connect/endpoints": [f"tls/127.0.0.1:{zero.book[0][1]}"], "transport/link/tls": tls}.items():
        config.insert_json5(name, json.dumps(value))
    got: queue.SimpleQueue[str] = queue.SimpleQueue()
    connects = whose in ("its own", "one that is not in the run")
    with contextlib.nullcontext() if connects else pytest.raises(zenoh.ZError):
        with zenoh.open(config) as client:
            client.declare_subscriber("**", receiver(got))
            client.liveliness().declare_subscriber(alive_key("*", "*"), receiver(got), history=True)
            token = client.liveliness().declare_token(alive_key(2, "start"))
            if whose == "its own":
                until(lambda: not got.empty() and 2 in zero._lines)
            for _ in range(20):
                one.send(0, b"x")
                client.put(key_of(0, 1), b"lies")
                nothing_comes(zero, one) if zero.events.get(timeout=5).data == b"x" else pytest.fail("what the client said came")
            assert (2 in zero._lines) == (whose == "its own")
            token.undeclare()
    from_others = taken(got) - {alive_key(2, "start"), key_of(0, 1)}  # but for what it said itself
    assert alive_key(0, zero._start) in from_others if whose == "its own" else not from_others


def test_who_has_another_secret_or_another_recipe_is_refused_by_name(mails):
    zero, one, two = mails(0, b"ours", lr=0.1), mails(1, b"theirs", lr=0.1), mails(2, b"ours", lr=0.2)
    until(lambda: one.refusals and two.refusals)
    assert "its DFL_SECRET is not that of process" in one.refusals[0]
    assert any("process 2 does not belong to this run: lr = '0.2' there, '0.1' here" in text for text in two.refusals)
    found = [zero.events.get(timeout=5) for _ in range(2)]
    assert {event.process for event in found if event.kind == "refused"} == {1, 2}
    assert not zero.connected() and not one.connected() and not two.connected()


def test_a_process_that_is_started_again_is_another_and_the_port_is_its_own(mails, keys):
    zero, one = mails(0), mails(1)
    meet(zero, one)
    port = one.book[1][1]
    one.close()
    again = ZenohMail(1, 3, secret=b"", about={}, check=lambda *_: "", patience=4.0, listen=("127.0.0.1", port),
                      identity=identity(keys, 1))
    again.meet([zero.book[0]])
    try:
        assert zero.events.get(timeout=5)[:2] == ("gone", 1)
        meet(zero, again)
        again.send(0, b"here")
        assert zero.events.get(timeout=5) == Event("message", 1, b"here")
    finally:
        again.close()


def test_beyond_one_machine_there_have_to_be_certificates(tmp_path, keys):
    config = configuration.from_dict({"peers": 3, "device": "cpu", "membership": {"mode": "survive", "transport": "zenoh"},
                                      "output": str(tmp_path / "process-1")})
    env = {"DFL_LISTEN": "10.1.2.3:7000"}
    with pytest.raises(ValueError, match="needs certificates beyond one machine"):
        make(config, Place(1, 3), None, {}, [], env)
    with pytest.raises(ValueError, match="authority.pem, process-1.pem, process-1.key missing, for process 1"):
        make(config, Place(1, 3), None, {}, [], env | {"DFL_CERTIFICATES": str(tmp_path)})
    made, mail, _ = make(config, Place(1, 3), None, {}, [], {"DFL_LISTEN": "127.0.0.1:0"})
    assert mail.identity is None and mail._listen[0] == "127.0.0.1"
    mail.close()
    certificates.make(tmp_path / "certificates", 2)  # beside the folders of the processes they are found
    _, mail, _ = make(config, Place(1, 3), None, {}, [], {"DFL_LISTEN": "127.0.0.1:0"})
    assert mail.identity == certificates.identity_of(tmp_path / "certificates", 1)
    mail.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "no.such.name.invalid"])
def test_who_does_not_listen_within_the_machine_alone_listens_beyond_it(host):
    """A machine may have its own name from the table of its loopback interface."""
    held, at = zenoh_session.reserve(("", 0), host)
    held.close()
    assert at[0] == "0.0.0.0"
    held, at = zenoh_session.reserve(("127.0.0.1", 0), host)
    held.close()
    assert at[0] == "127.0.0.1"


def test_a_port_or_a_certificate_that_is_none_is_one_line(tmp_path, keys):
    broken = identity(keys, 0)._replace(certificate=tmp_path / "broken.pem")
    broken.certificate.write_text("broken")
    with pytest.raises(ConnectionError, match="^zenoh cannot listen at 127.0.0.1:") as caught:
        open_session(("127.0.0.1", 0), [], 3, 5.0, broken)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_without_survive_there_is_no_carrier_to_choose():
    with pytest.raises(ValueError, match="membership.transport = 'zenoh' needs membership.mode = 'survive', got 'fixed'"):
        check(configuration.from_dict({"device": "cpu", "membership": {"transport": "zenoh"}}))
