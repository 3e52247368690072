"""A member of a run at work that begins to send what no member sends: it is out, by name, and the others finish. Over TCP, and over
zenoh, where its certificate proves the name."""

import re

import pytest
from members import Group, _work
from tiny_runs import arguments, make_folder

from dfl.run.replay import replay

pytestmark = pytest.mark.distributed
HONEST = 30  # frames, before the first that is none


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("liars"))


def half(frame: bytes, before: bytes) -> bytes:
    return frame[:len(frame) // 2]


def other_numbers(frame: bytes, before: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def of_an_old_round(frame: bytes, before: bytes) -> bytes:
    """Under the place of today."""
    return frame[:16] + before[16:]


LIES = {"half": half, "other numbers": other_numbers, "an old round": of_an_old_round}
WORDS = {"stop": 2, "halt": 3, "diverged": 6, "no word": -1}  # of the loop, as a run has them that ends with any of its processes
CHECKPOINTS = "checkpoints beyond the end"
REASONS = {"half": "sent a message of 20 bytes; allowed: ", "other numbers": "sent a message whose digest is not that of its",
           "an old round": "sent a message with round = 1; expected ", "no JSON": "sent what no member sends: ",
           **{word: rf" said {number} in an agreement in round \d+; allowed: 0 to [01]\n" for word, number in WORDS.items()},
           CHECKPOINTS: "told nonsense of itself: checkpoints = 1000000; allowed: 0 to 40"}


def _lie(tree, env, log, resume):
    """`_work`, but for what it sends after a while."""
    from dfl.run import survive
    from dfl.transport import members
    from dfl.transport.control import ControlPlane
    send, frames = members.Members._send, []

    def lying(self, process, kind, data=b""):
        if kind == members._FRAME:
            frames.append((process, data))
            before = next(old for receiver, old in frames if receiver == process)
            if len(frames) > HONEST and env["LIE"] in LIES:
                data = LIES[env["LIE"]](data, before)
            elif len(frames) > HONEST:
                kind, data = members._STATE, b"{"
        send(self, process, kind, data)

    agree, agreements = ControlPlane.agree, []

    def lying_word(self, value, most=None):
        agreements.append(value)
        return agree(self, WORDS[env["LIE"]] if len(agreements) > HONEST else value, 2**63 - 1)

    if env["LIE"] in WORDS:
        ControlPlane.agree = lying_word
    elif env["LIE"] == CHECKPOINTS:
        survive.Survivors.settle = lambda self, info, honest=survive.Survivors.settle: honest(self, info | {"checkpoints": [10**6]})
    else:
        members.Members._send = lying
    _work(tree, env, log, resume)


@pytest.mark.parametrize("transport", ["tcp", "zenoh"])
@pytest.mark.parametrize("lie", REASONS)
def test_a_member_that_lies_is_out_by_name_and_the_others_finish(place, tmp_path, lie, transport):
    env = {}
    if transport == "zenoh":
        pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
        from dfl.transport.certificates import make
        make(tmp_path / "certificates", 3)
        env = {"DFL_CERTIFICATES": str(tmp_path / "certificates")}
    words = arguments(place / "bert", place / "data.csv", tmp_path / "run", peers=3, membership__mode="survive",
                      membership__transport=transport, membership__patience=5, train__rounds=40, eval__every=20)
    with Group(tmp_path, words, 3, env) as run:
        run.start(0)
        run.start(1)
        run.start(2, work=_lie, LIE=lie)
        assert [run.wait(process) for process in (0, 1)] == [0, 0], run.everything()
        told = run.said(0) + run.said(1)
        assert "going on without process 2 (peer 2, host " in told and re.search(REASONS[lie], told), run.everything()
        assert run.lines(0)[-1]["alive"] == run.lines(1)[-1]["alive"] == [0, 1] and run.lines(0)[-1]["round"] == 40
        assert "Traceback" not in told and "terminate called" not in told, told
    found = replay(tmp_path / "run")
    assert found.all and found.peers == [0, 1], found
