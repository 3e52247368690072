"""What members tell of themselves when they settle: nonsense is its teller's fault, and of the rest all make the same plan."""

import json
from types import SimpleNamespace

import pytest

from dfl.run import survive
from dfl.run.told import Plan, Told, plan_of, read
from dfl.transport.members import FaultError, FinishedError, ViewChange

HOSTS, ROUNDS = {0: [0, 1], 1: [2], 2: [3]}, 40
AT_WORK = {"progress": 7, "checkpoints": [], "came": None, "changes": [[0, [0, 1, 2, 3]], [5, [0, 1, 2]]]}
CAME = {"round": 7, "turn": 0, "from": "neighbours", "of": {"2": {"0": 0.5, "3": 0.5}}}


def test_what_honest_members_tell_is_read_as_they_mean_it():
    told = read({0: AT_WORK, 1: AT_WORK | {"came": CAME}, 2: {"progress": None, "checkpoints": [5, 0], "came": None, "changes": []}},
                HOSTS, ROUNDS)
    assert told == {0: Told(7, [], None, [(0, (0, 1, 2, 3)), (5, (0, 1, 2))]), 1: Told(7, [], CAME, told[0].changes),
                    2: Told(None, [0, 5], None, [])}
    assert json.loads(json.dumps(told[1].came)) == CAME
    checkpoint = {"round": 7, "turn": 3, "from": "checkpoint", "of": 5}
    assert read({1: AT_WORK | {"came": checkpoint}}, HOSTS, ROUNDS)[1].came == checkpoint


@pytest.mark.parametrize("lie", [
    {"progress": 41}, {"progress": -1}, {"progress": "7"}, {"progress": True}, {"checkpoints": 5}, {"checkpoints": [41]},
    {"checkpoints": [1.5]}, {"changes": 5}, {"changes": ["ab"]}, {"changes": [[5, [0]], [0, [0]]]}, {"changes": [[0, []]]},
    {"changes": [[0, [4]]]}, {"changes": [[41, [0]]]}, {"came": 5}, {"came": {"round": 7, "turn": 0}}, {"came": CAME | {"turn": -1}},
    {"came": CAME | {"from": "nowhere"}}, {"came": CAME | {"of": 5}}, {"came": CAME | {"of": {"3": {"0": 1.0}}}},
    {"came": CAME | {"of": {"2": {"4": 1.0}}}}, {"came": CAME | {"of": {"2": {"0": 0.0}}}},
    {"came": CAME | {"of": {"2": {"0": float("nan")}}}}, {"came": CAME | {"of": {"2": [0]}}}, {"came": CAME | {"from": "checkpoint"}},
    {name: None for name in ("checkpoints", "changes")}], ids=str)
def test_who_tells_nonsense_is_at_fault(lie):
    with pytest.raises(FaultError) as error:
        read({0: AT_WORK, 1: AT_WORK | lie, 2: AT_WORK}, HOSTS, ROUNDS)
    assert error.value.process == 1 and str(error.value).startswith("told nonsense of itself: ")


@pytest.mark.parametrize("name", list(AT_WORK))
def test_who_leaves_something_out_is_at_fault(name):
    with pytest.raises(FaultError):
        read({1: {key: value for key, value in AT_WORK.items() if key != name}}, HOSTS, ROUNDS)


def at(*progress: int | None, **checkpoints: list[int]) -> dict[int, Told]:
    return {q: Told(t, sorted(checkpoints.get(f"of_{q}", [])), None, []) for q, t in enumerate(progress)}


def test_those_at_work_go_on_with_the_least_of_their_rounds():
    assert plan_of(at(7, 6, 7), 0) == Plan(6, [], False)
    assert plan_of(at(7, None, 6, of_1=[9]), 1) == Plan(6, [1], False)


def test_where_nobody_is_at_work_all_begin_with_what_most_have():
    assert plan_of(at(None, None, None), 0) == Plan(0, [], True)
    assert plan_of(at(None, None, None, of_0=[4, 8], of_1=[4], of_2=[9]), 0) == Plan(4, [2], True)
    assert plan_of(at(None, None, of_0=[4], of_1=[8]), 0) == Plan(8, [0], True)


@pytest.mark.parametrize("progress, liar", [((7, 7, 2), 2), ((7, 0, 6), 1), ((0, 7, 8, 7), 0), ((7, 7, 40, 3), 3), ((6, 7, 5), 2)])
def test_who_would_take_the_others_back_further_than_a_round_is_at_fault(progress, liar):
    for me in set(range(len(progress))) - {liar}:
        with pytest.raises(FaultError) as error:
            plan_of(at(*progress), me)
        assert error.value.process == liar and f"told that it is at round {progress[liar]}, where " in str(error.value)


def test_nobody_finds_itself_at_fault_nor_one_that_is_ahead():
    assert plan_of(at(7, 40, 7), 0).round == 7
    assert plan_of(at(0, 7), 0).round == 0


class AtTheEnd:
    """A process that has come to the end, where the members change in the last agreement."""

    def __init__(self):
        self.transport, self.group, self.stop, self.run = self, SimpleNamespace(ending=False), SimpleNamespace(received=0), self
        self._again, self.completed, self.ended_well, self.hooks = False, 5, False, None
        self.settled: list[bool] = []

    def agree(self, value, most):
        raise ViewChange

    def _progress(self):
        return 5

    def _settle(self, progress):
        self.settled.append(self.group.ending)
        if len(self.settled) > 1:
            raise FinishedError

    def _save(self):
        pass

    def _ended(self):
        return True


def test_the_word_that_all_have_ended_may_come_behind_the_loss_of_another(monkeypatch):
    """Else who says it, and has left, would be held for a liar."""
    monkeypatch.setattr(survive, "run_rounds", lambda run, hooks: True)
    one = AtTheEnd()
    one._again = True
    assert survive.Process._rounds(one) is True and one.settled == [False, True]
