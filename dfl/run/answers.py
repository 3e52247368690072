"""Generated answers in an evaluation: every process asks its own peers, process 0 the consensus model."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from dfl.adapters.attach import Rows
from dfl.config import Config
from dfl.metrics.answers import Answers, load_measure
from dfl.metrics.evaluator import over_peers
from dfl.training import executors


def make_answers(config: Config, adapted: Any, bundle: Any, device: Any) -> Answers | None:
    """None where eval.generate.examples is 0."""
    chosen = config.eval.generate
    if not chosen.examples:
        return None
    return Answers(adapted, bundle.valid, bundle.processor, chosen.examples, chosen.max_new_tokens, load_measure(chosen.metric),
                   config.eval.batch_size, executors.autocasts(config.train.autocast, device))


def add_answers(run: Any, record: dict, halted: Callable[[], bool]) -> None:
    """Put the scores of generated answers among the metrics of a record that is not yet summarised, and on process 0 a few answers.

    GivenUp on all processes once `halted()` on one.
    """
    answers, consensus = run.answers, None
    of_peers = _asked(run, run.rows(), range(len(run.peers.ids)), halted)
    scores = over_peers([answers.scores(said) for said in of_peers])
    if run.config.eval.consensus:
        merged = run.consensus()
        consensus = _of_one(run, merged, halted)
    _put(run, record, scores, of_peers[0], consensus)


def add_first_answers(run: Any, record: dict, halted: Callable[[], bool]) -> None:
    """The same before the first round, when all models are equal."""
    said = _of_one(run, run.rows(), halted)
    scores = over_peers([run.answers.scores(said)] * len(run.peers.ids))
    _put(run, record, scores, said, said if "consensus" in record else None)


def _of_one(run: Any, rows: Rows, halted: Callable[[], bool]) -> list[str]:
    """What the first of `rows` answers, which process 0 asks and tells all."""
    found = _asked(run, rows, [0] if run.transport.rank == 0 else [], halted)
    return json.loads(run.transport.spread(json.dumps(found[0] if found else None).encode()))


def _asked(run: Any, rows: Rows, models: Sequence[int], halted: Callable[[], bool]) -> list[list[str]]:
    found = []
    for index in models:
        if halted():
            break
        found.append(run.answers.of(rows, index, halted))
    run.give_up_together(halted())
    return found


def _put(run: Any, record: dict, scores: dict, of_first: list[str], consensus: list[str] | None) -> None:
    record["peers"] |= scores.pop("peers")
    record |= scores
    by_model = {f"peer {run.peers.ids[0]}": of_first}
    if consensus is not None:
        record["consensus"] |= run.answers.scores(consensus)
        by_model = {"consensus": consensus, **by_model}
    if run.transport.rank == 0:
        record["samples"] = run.answers.samples(run.config.eval.generate.shown, by_model)
