"""The line of a round and the closing table, from records as a run writes them."""

import io
import json
import math
import os
import signal

import pytest
import tiny_runs
import yaml
from made_up_runs import write_checkpoint

from dfl import report
from dfl.cli import main
from dfl.run.console import Console
from dfl.store.records import JsonLines


def evaluation(values, consensus=None, primary="accuracy"):
    result = {primary: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}, "peers": {primary: values}}
    return result | ({} if consensus is None else {"consensus": {primary: consensus}})


def write_run(folder, records, method="tad", rounds=None):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": {"name": method}, "train": {"rounds": rounds}}))
    lines = JsonLines(folder / "metrics.jsonl")
    for record in records:
        lines.write(record)
    lines.close()
    return folder


RECORDS = [{"round": 0, "eval": evaluation([0.2, 0.2], 0.2)}, {"round": 1, "train_loss": {}},
           {"round": 5, "eval": evaluation([0.9, 0.8], 0.87)}, {"round": 10, "eval": evaluation([0.7, 0.9], 0.81)}]


def cells(table, first):
    (line,) = [line for line in table.splitlines() if line.startswith(first)]
    return line.split()[len(first.split()):]


def test_closing_table_shows_before_after_and_best_of_peers_and_consensus(tmp_path):
    table = report.closing_table(write_run(tmp_path / "run", RECORDS))
    assert cells(table, "peer") == ["before", "after", "tad"]
    assert cells(table, "0 ") == ["0.2000", "0.7000"] and cells(table, "1 ") == ["0.2000", "0.9000"]
    assert cells(table, "mean") == ["0.2000", "0.8000"] and cells(table, "consensus") == ["0.2000", "0.8100"]
    assert "best mean over peers 0.8500, after round 5" in table


def test_local_training_alone_has_a_column_of_its_own(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    write_run(run / "baseline-local", [RECORDS[0], {"round": 10, "eval": evaluation([0.3, 0.4], 0.35)}], method="local")
    table = report.closing_table(run)
    assert cells(table, "peer") == ["before", "after", "tad", "local", "alone"]
    assert cells(table, "mean") == ["0.2000", "0.8000", "0.3500"]


def test_local_training_that_was_stopped_is_no_equal_beside_the_finished_run(tmp_path):
    run = write_run(tmp_path / "run", RECORDS, rounds=10)
    short = [RECORDS[0], {"round": 2, "eval": evaluation([0.3, 0.4], 0.35)}]
    write_run(run / "baseline-local", short, method="local", rounds=10)
    table = report.closing_table(run)
    assert "after tad  local alone, round 2 of 10" in table and cells(table, "mean") == ["0.2000", "0.8000", "0.3500"]
    assert "local training alone is not finished (unfinished, 2 of 10 rounds): --resume goes on with it" in table


def test_a_run_that_is_not_at_its_end_stands_beside_the_same_round_of_local_training(tmp_path):
    run = write_run(tmp_path / "run", RECORDS[:3], rounds=10)
    alone = [{"round": t, "eval": evaluation([v, v], v)} for t, v in ((0, 0.2), (5, 0.3), (10, 0.4))]
    write_run(run / "baseline-local", alone, method="local", rounds=10)
    table = report.closing_table(run)
    assert "after tad, round 5 of 10  local alone, round 5 of 10" in table and cells(table, "mean") == ["0.2000", "0.8500", "0.3000"]
    (run / "ended.json").write_text("{}")  # a callback has ended it: that is its end
    assert "after tad  local alone, round 5 of 10" in report.closing_table(run)


@pytest.mark.long
def test_a_signal_in_local_training_leaves_a_table_that_says_so(tmp_path, monkeypatch, capsys):
    write = JsonLines.write

    def stop_there(self, line):
        write(self, line)
        if line["round"] == 2 and (tmp_path / "run/baseline-local/metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    tiny_runs.make_folder(tmp_path)
    words = ["train", *tiny_runs.arguments(tmp_path / "bert", tmp_path / "data.csv", tmp_path / "run", baseline="local",
                                           train__rounds=6)]
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", stop_there)
        assert main(words) == 75
    out = capsys.readouterr().out
    assert "after lora  local alone, round 2 of 6" in out and "local training alone is not finished (unfinished, " in out
    assert main([*words, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "after lora  local alone  on own data\n" in out and "not finished" not in out


def test_a_baseline_that_has_not_come_to_an_evaluation_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    write_run(run / "baseline-local", [])
    assert cells(report.closing_table(run), "mean") == ["0.2000", "0.8000"]


def test_perplexity_is_better_when_smaller_and_may_be_infinite(tmp_path):
    run = write_run(tmp_path / "run", [{"round": t, "eval": evaluation([v, v], v, "perplexity")}
                                       for t, v in enumerate((math.inf, 3.0, 4.0))])
    (run / "run.json").write_text(json.dumps({"facts": {"primary": "perplexity", "better": {"perplexity": "lower"}}}))
    table = report.closing_table(run)
    assert table.lstrip().startswith("perplexity") and cells(table, "mean") == ["-", "4.0000"]
    assert "best mean over peers 3.0000, after round 1" in table


@pytest.mark.parametrize("higher, best", [(True, "4.0000, after round 0"), (False, "2.0000, after round 1")])
def test_the_run_says_which_metric_counts_and_which_way_is_better(higher, best, tmp_path):
    rows = [{"round": t, "eval": evaluation([0.5], 0.5) | evaluation([v], v, "f1") | {"peers": {"accuracy": [0.5], "f1": [v]}}}
            for t, v in enumerate((4.0, 2.0, 3.0))]
    run = write_run(tmp_path / "run", rows)
    assert report.closing_table(run).lstrip().startswith("accuracy")  # an older run says nothing
    (run / "run.json").write_text(json.dumps({"facts": {"primary": "f1", "better": {"f1": "higher" if higher else "lower"}}}))
    table = report.closing_table(run)
    assert table.lstrip().startswith("f1 on") and f"best mean over peers {best}" in table
    assert "\nmean over peers of accuracy 0.5000\n" in table


def test_consensus_evaluation_may_be_off_or_begin_later(tmp_path):
    table = report.closing_table(write_run(tmp_path / "off", [{"round": t, "eval": evaluation([0.1])} for t in (0, 1)]))
    assert "\nconsensus" not in table
    late = [{"round": 0, "eval": evaluation([0.1])}, {"round": 1, "eval": evaluation([0.1], 0.4)}]
    assert cells(report.closing_table(write_run(tmp_path / "late", late)), "consensus") == ["-", "0.4000"]


def test_a_run_without_an_evaluation_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="run' holds no evaluation yet"):
        report.closing_table(write_run(tmp_path / "run", [{"round": 1}]))


def test_the_way_to_load_names_the_last_whole_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    assert "no complete checkpoint" in report.closing_table(run)
    for rounds in (5, 10):
        write_checkpoint(run, rounds)
    table = report.closing_table(run)
    assert f"adapters: {run}/checkpoints/round-00010/peer-*" in table and f"dfl eval {run}" in table
    assert f"PeftModel.from_pretrained(base_model, '{run}/checkpoints/round-00010/consensus')" in table


def test_round_line_shows_what_the_round_measured():
    record = {"train_loss": {"mean": 0.51234}, "trains": "A+B", "edges": 8}
    assert report.round_line(record, "accuracy") == "loss 0.512  trains A+B  edges 8"
    record |= {"measures": {"consensus_distance": 0.012345}, "eval": evaluation([0.5, 1.0], 0.75)}
    assert report.round_line(record, "accuracy").endswith(
        "edges 8  distance 0.0123  accuracy 0.7500 (0.5000 to 1.0000), consensus 0.7500")


def test_columns_are_aligned():
    text = report.align([["peer", "before"], ["0", "0.25"], ["consensus", "0.5"]])
    assert text.splitlines() == ["peer       before", "-----------------", "0            0.25", "consensus     0.5"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_evaluation_stays_above_the_bar_and_out_of_it():
    record = {"round": 3, "train_loss": {"mean": 0.5}, "trains": "A", "edges": 2, "eval": evaluation([0.5, 1.0], 0.75)}
    said = report.evaluation_line(record, "accuracy")
    assert said == "accuracy 0.7500 (0.5000 to 1.0000), consensus 0.7500" and report.evaluation_line({}, "accuracy") == ""
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        console = Console(4, stream=stream)
        console.round(2, report.training_line(record), True, said)
        console.close()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert f"round 3/4  {said}" in lines and not any("accuracy" in line for line in lines if "%|" in line)
    assert log.getvalue().startswith(f"round 3/4  loss 0.500  trains A  edges 2  {said}  left ") and log.getvalue().count("\n") == 1
