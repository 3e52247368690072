"""Damage in metrics.jsonl costs the lines that have it and no other, is said, and nothing unread is thrown away."""

import json
import os
import random

import pytest
import tiny_runs
from made_up_runs import record as made_up
from made_up_runs import write_run

from dfl.cli import main
from dfl.report.live import lines as watched
from dfl.run import train as running
from dfl.store.jsonlines import scan
from dfl.store.records import JsonLines, read_lines


def line(t):
    return {"round": t, "loss": {"mean": t / 3}, "edges": 8}


def write(path, rounds=6):
    path.write_text("".join(json.dumps(line(t)) + "\n" for t in range(rounds)))
    return path.read_bytes()


def flip(path, number, at=0, bit=1):
    """One bit of a line, from 1, at a place in it."""
    lines = path.read_bytes().split(b"\n")
    changed = bytearray(lines[number - 1])
    changed[at] ^= bit
    lines[number - 1] = bytes(changed)
    path.write_bytes(b"\n".join(lines))


def said(caplog):
    found = [entry.getMessage() for entry in caplog.records]
    caplog.clear()
    return found


def test_the_records_after_a_damaged_line_are_there_and_it_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path)
    flip(path, 3)
    assert [r["round"] for r in read_lines(path)] == [0, 1, 3, 4, 5]
    assert said(caplog) == [f"dfl: WARNING: {tmp_path}: line 3 of metrics.jsonl cannot be read (damaged) and is left out"]
    flip(path, 5)
    assert [r["round"] for r in read_lines(path)] == [0, 1, 3, 5]
    assert "lines 3, 5 of metrics.jsonl cannot be read (damaged) and are left out" in said(caplog)[0]


@pytest.mark.parametrize("change", ["[1, 2]", "7", '{"rounds": 2}', '{"round": "2"}', '{"round": true}', '{"round": -2}',
                                    pytest.param("[" * 100_000, id="deep")])
def test_json_that_is_no_round_is_damage_too(tmp_path, caplog, change):
    lines = write(tmp_path / "metrics.jsonl").decode().splitlines()
    lines[2] = change
    found = scan("\n".join([*lines, ""]).encode())
    assert (found.damaged, found.torn, [r["round"] for r in found.records]) == ([3], False, [0, 1, 3, 4, 5])


@pytest.mark.parametrize("number", range(2, 6))
def test_a_round_whose_digit_is_another_does_not_displace_its_neighbours(tmp_path, number):
    path = tmp_path / "metrics.jsonl"
    write(path)
    for bit in (1, 2, 4, 8):
        write(path)
        flip(path, number, at=len('{"round": '), bit=bit)
        found = scan(path.read_bytes())
        assert [r["round"] for r in found.records] == [t for t in range(6) if t != number - 1] and found.damaged == [number]


def test_a_flipped_bit_costs_two_lines_at_most_and_is_never_silent_where_a_line_is_lost(tmp_path):
    """Also one that makes two lines of one (an end of a line), or one of two."""
    path, chance = tmp_path / "metrics.jsonl", random.Random(0)
    whole = write(path)
    for _ in range(2000):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw) - 1)] ^= 1 << chance.randrange(8)
        found = scan(bytes(raw))
        lost = 6 - len(found.records)
        assert lost <= 2 and (lost == 0 or found.damaged)


@pytest.mark.parametrize("torn", [b'{"round": 6, "lo', b"\x00\x00", b'{"round": 6}x'])
def test_a_torn_last_line_stays_silent_and_goes(tmp_path, caplog, torn):
    path = tmp_path / "metrics.jsonl"
    whole = write(path)
    path.write_bytes(whole + torn)
    assert len(read_lines(path)) == 6
    JsonLines(path, keep_before=6).close()
    assert path.read_bytes() == whole and said(caplog) == [] and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_what_lies_between_earlier_rounds_stays_byte_for_byte(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path)
    flip(path, 3)
    before = path.read_bytes()
    lines = JsonLines(path, keep_before=5)
    lines.write(line(5))
    lines.close()
    assert path.read_bytes() == before  # rounds 0 to 4 with the damaged line, then round 5 again, which is the same
    assert len(said(caplog)) == 1 and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_damaged_line_that_would_go_is_kept_in_a_copy(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path)
    flip(path, 5)
    before = path.read_bytes()
    for number in (1, 2):
        JsonLines(path, keep_before=3).close()
        assert path.read_bytes() == b"".join(before.splitlines(True)[:3])
        assert (tmp_path / f"metrics.jsonl.damaged-{number}").read_bytes() == before
        assert f"line 5 of metrics.jsonl cannot be read (damaged) and is left out; the file as it was is kept as " \
               f"metrics.jsonl.damaged-{number}" in said(caplog)[0]
        path.write_bytes(before)
    JsonLines(path, keep_before=0).close()
    assert path.read_bytes() == b"" and (tmp_path / "metrics.jsonl.damaged-3").read_bytes() == before


def test_a_run_goes_on_beside_a_damaged_record(tmp_path, capsys, caplog, monkeypatch):
    root = tiny_runs.make_folder(tmp_path)
    words = ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", train__rounds=5)]
    tiny_runs.stop_after(running, 3, patch=monkeypatch.setattr)
    assert main(words) == running.STOPPED
    monkeypatch.undo()
    path = tmp_path / "run" / "metrics.jsonl"
    kept = path.read_bytes()
    flip(path, 2)
    caplog.clear()
    assert main([*words, "--resume"]) == 0
    assert any(f"{tmp_path / 'run'}: line 2 of metrics.jsonl cannot be read" in text for text in said(caplog))
    assert [r["round"] for r in read_lines(path)] == [0, 2, 3, 4, 5]
    assert path.read_bytes().splitlines()[2:4] == kept.splitlines()[2:4]
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "line 2 of metrics.jsonl cannot be read (damaged) and is left out" in (tmp_path / "run" / "report.md").read_text()


def test_who_watches_is_told(tmp_path):
    run = write_run(tmp_path / "run", [made_up(t, [0.5, 0.5]) for t in range(5)])
    flip(run / "metrics.jsonl", 3)
    assert "line 3 of metrics.jsonl cannot be read (damaged) and is left out" in list(watched(run, 0.01))
