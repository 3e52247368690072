"""Which of the records that processes have kept of a run lead to its end: made-up records, no processes."""

import json

import pytest

from dfl.store.collect import history


def write(run, process: int, *rounds: tuple[int, int, list[int]]) -> None:
    """(first round, last round, who was there); what comes later of a round counts."""
    folder = run / f"process-{process}"
    folder.mkdir()
    lines = [{"round": t, "alive": alive, "hosted": [process], "train_loss_peers": [0.1 * t + len(alive)]}
             for first, last, alive in rounds for t in range(first, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def told(run) -> tuple[int, dict[int, list[int]]]:
    found = history(run)
    return found.first, {t: line["alive"] for t, line in found.lines.items()}


def test_a_round_that_the_others_did_again_without_its_process_is_not_the_end(tmp_path):
    """Process 2 was cut off once it had recorded round 3; for the others round 3 was not over."""
    write(tmp_path, 0, (0, 2, [0, 1, 2]), (3, 40, [0, 1]))
    write(tmp_path, 1, (0, 2, [0, 1, 2]), (3, 40, [0, 1]))
    write(tmp_path, 2, (0, 3, [0, 1, 2]))
    first, alive = told(tmp_path)
    assert first == 0 and sorted(alive) == list(range(41))
    assert [alive[t] for t in (2, 3, 40)] == [[0, 1, 2], [0, 1], [0, 1]]
    assert history(tmp_path).losses(3) == {0: pytest.approx(2.3), 1: pytest.approx(2.3)}


def test_who_did_the_last_round_again_alone_is_not_the_end(tmp_path):
    for process in (0, 1):
        write(tmp_path, process, (0, 9, [0, 1, 2]))
    write(tmp_path, 2, (0, 8, [0, 1, 2]), (9, 12, [2]))
    first, alive = told(tmp_path)
    assert first == 0 and alive[9] == [0, 1, 2] and max(alive) == 9


def test_of_a_run_in_two_parts_the_larger_counts_though_the_smaller_goes_further(tmp_path):
    for process in (0, 1, 2):
        write(tmp_path, process, (0, 4, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2]))
    for process in (3, 4):
        write(tmp_path, process, (0, 4, [0, 1, 2, 3, 4]), (5, 19, [3, 4]))
    first, alive = told(tmp_path)
    assert first == 0 and max(alive) == 9 and alive[5] == [0, 1, 2]


def test_a_run_that_lost_one_after_the_other_ends_with_the_last(tmp_path):
    write(tmp_path, 0, (0, 5, [0, 1, 2]))
    write(tmp_path, 1, (0, 5, [0, 1, 2]), (6, 7, [1, 2]))
    write(tmp_path, 2, (0, 5, [0, 1, 2]), (6, 7, [1, 2]), (8, 20, [2]))
    first, alive = told(tmp_path)
    assert first == 2 and [len(alive[t]) for t in (5, 6, 8)] == [3, 2, 1]


def test_who_did_a_round_again_without_those_that_were_killed_in_it_is_the_end(tmp_path):
    """One of the three had recorded it already; the two others say nothing of it."""
    write(tmp_path, 0, (0, 1, [0, 1, 2, 3]))
    write(tmp_path, 1, (0, 0, [0, 1, 2, 3]))
    write(tmp_path, 2, (0, 0, [0, 1, 2, 3]))
    write(tmp_path, 3, (0, 0, [0, 1, 2, 3]), (1, 30, [3]))
    first, alive = told(tmp_path)
    assert first == 3 and alive[0] == [0, 1, 2, 3] and alive[1] == alive[30] == [3]
