"""`dfl plan` as somebody uses it, on a tiny model: plan, run what it prints, compare; and what it refuses, and in which words."""

import json
import shlex
from pathlib import Path

import pytest
import tiny_runs
import yaml

from dfl.cli import main
from dfl.config import resolve
from dfl.plan import compare, table
from dfl.plan.candidates import combine, read_axes, read_axis
from dfl.store.records import read_lines
from dfl.store.runs import RunData

TARGET = 0.6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tiny_runs.make_folder(tmp_path_factory.mktemp("plan"))
    fields = {"train__rounds": 24, "train__lr": 0.04, "model__head_std": 3.0, "lora__head": "mixed", "lora__rank": 4}  # it learns
    config = tiny_runs.make_config(folder / "bert", folder / "data.csv", folder / "run", eval__every=1, eval__primary="loss",
                                   measure__every=0, **fields)
    (folder / "my.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return folder


def words(place: Path, *more: str, target: float = TARGET) -> list[str]:
    return ["plan", str(place / "my.yaml"), "--bandwidth", "50", "--latency", "50", "--target", str(target), *more]


CHOSEN = ("--topologies", "ring,complete,{name: torus, rows: 2}", "--codecs", "none,int8", "--intervals", "2,4",
          "--triggers", "always,{name: event, threshold: 0.1, decay: constant}", "--probe", "12", "--step-seconds", "0.01")


@pytest.fixture(scope="module")
def plan(place) -> dict:
    assert main(words(place, *CHOSEN, "--output", str(place / "planned"))) == 0
    return json.loads((place / "planned" / "plan.json").read_text())


def line(plan: dict, **fields) -> dict:
    """The one combination with these fields."""
    (found,) = [one for one in plan["combinations"] if one["fields"] == {"method": "lora", "trigger": "always", "codec": "none",
                                                                        "train.local_steps": 2} | fields]
    return found


def test_a_plan_has_every_combination_in_order(plan, place):
    assert len(plan["combinations"]) == 16 and [one["rank"] for one in plan["combinations"]] == list(range(1, 17))
    seconds = [one["seconds"] for one in plan["combinations"] if one["seconds"] is not None]
    assert seconds == sorted(seconds) and len(seconds) >= 8
    assert all(one["rounds_low"] <= one["rounds"] for one in plan["combinations"] if one["rounds"] is not None)
    (left,) = plan["left_out"]  # four peers have no torus: of each method, codec, trigger and interval
    assert left["combinations"] == 8 and "torus" in left["reason"]
    assert line(plan, topology="complete")["rho"] < 1e-12 and line(plan, topology="ring")["rho"] == pytest.approx(1 / 9)
    assert line(plan, topology="ring", codec="int8")["bytes_a_round"] < 0.5 * line(plan, topology="ring")["bytes_a_round"]
    event = [one for one in plan["combinations"] if one["fields"]["trigger"] != "always"]
    assert all(0 <= one["share"] < 1 for one in event) and {one["share"] for one in event} != {0.0}
    assert {probe["local_steps"]: probe["rounds"] for probe in plan["probes"]} == {2: 12, 4: 6}
    assert (place / "planned" / "plan.md").read_text().count("\n| ") >= 17


@pytest.mark.parametrize("fields", [{"topology": "ring"}, {"topology": "complete", "codec": "int8", "train.local_steps": 4}])
def test_bytes_and_seconds_of_a_round_are_those_of_a_run(plan, place, fields):
    """They are counted by the same gossip on the same clock."""
    one = line(plan, **fields)
    output = place / f"run-{fields['topology']}"
    assert main([*shlex.split(one["command"])[1:], "--output", str(output)]) == 0
    records = read_lines(output / "metrics.jsonl")[1:]
    assert [record["message_bytes"] for record in records[1:4]] == [one["bytes_a_round"]] * 3
    assert records[3]["ledger"]["seconds"] - records[2]["ledger"]["seconds"] == pytest.approx(one["seconds_a_round"])
    assert main(["plan", "--compare", str(place / "planned"), str(output), "--output", str(place / "compared")]) == 0
    (found,) = json.loads((place / "compared" / "compared.json").read_text())["runs"]
    there = next(record for record in records if record["eval"]["loss"]["mean"] <= TARGET)
    assert found["took"]["rounds"] == there["round"] and found["rank"] == one["rank"]
    assert found["took"]["seconds"] == pytest.approx(there["ledger"]["seconds"])
    assert found["error"]["rounds"] == pytest.approx(one["rounds"] / there["round"] - 1)
    # until the round that was planned the run has sent what was planned, in that time: what is off is off by rounds alone
    planned = records[:int(one["rounds"])]
    assert sum(record["message_bytes"] for record in planned) == pytest.approx(one["bytes"])
    assert planned[-1]["ledger"]["seconds"] == pytest.approx(one["seconds"])
    assert abs(found["error"]["rounds"]) < 1


def test_a_plan_is_the_same_again(plan, place):
    assert main(words(place, *CHOSEN, "--output", str(place / "again"))) == 0
    again = json.loads((place / "again" / "plan.json").read_text())
    assert again["combinations"] == plan["combinations"]


def test_a_plan_is_not_replaced_unasked(plan, place, capsys):
    assert main(words(place, "--output", str(place / "planned"))) == 2
    assert "already holds a plan; allowed: another folder, or --overwrite" in capsys.readouterr().err


REFUSED = {
    "--bandwidth = -50.0 is not allowed; allowed: a number above 0": ("--bandwidth", "-50"),
    "--latency = -1.0 is not allowed; allowed: a number from 0": ("--latency", "-1"),
    "--target nan is not allowed": ("--target", "nan"),
    "--step-seconds = -0.1 is not allowed": ("--step-seconds", "-0.1"),
    "--probe = 1 is not allowed; allowed: a whole number from 2": ("--probe", "1"),
    "--topologies = 'rng' is not known (did you mean 'ring'?); allowed: path, ring": ("--topologies", "rng,ring"),
    "--methods = 'lorra' is not known (did you mean 'lora'?)": ("--methods", "lorra"),
    "--codecs = 'int9' is not known": ("--codecs", "none,int9"),
    "--triggers 3 is not allowed; allowed: names, or mappings": ("--triggers", "3"),
    "--triggers = 'evnt' is not known": ("--triggers", "{name: evnt}"),
    "--intervals = 0 is not allowed; allowed: a whole number from 1": ("--intervals", "0,4"),
    "--codecs '{name: int8' is no list": ("--codecs", "{name: int8"),
    "--metric = 'f2' is not known": ("--metric", "f2"),
    "--metric = 'perplexity' is of a predicted token": ("--metric", "perplexity"),
    "none of 1 combinations is possible: ": ("--topologies", "{name: torus, rows: 2}", "--codecs", "none", "--intervals", "2"),
    "train.local_epochs = 1: a plan counts local steps": ("--train.local_epochs", "1", "--train.local_steps", "null"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_input_is_named(place, capsys, text):
    assert main(words(place, *REFUSED[text], "--output", str(place / "refused"))) == 2
    assert text in capsys.readouterr().err and not (place / "refused").exists()


def test_a_target_behind_the_start_is_refused(place, capsys):
    assert main(words(place, "--topologies", "ring", "--codecs", "none", "--intervals", "2", "--probe", "3", target=5.0)) == 2
    assert "--target 5.0 is reached before the first round, loss " in capsys.readouterr().err


@pytest.mark.parametrize(("given", "text"), [
    ("my.yaml --latency 1 --target 1", "--bandwidth is missing"),
    ("a.yaml b.yaml --bandwidth 1 --latency 1 --target 1", "2 recipes; allowed: one"),
    ("--compare nowhere.json run", "--compare 'nowhere.json' cannot be read"),
    ("--compare nowhere.json run --lora.rank 2", "--lora.rank is for a recipe")])
def test_what_is_missing_is_named(given, text, capsys):
    assert main(["plan", *given.split()]) == 2
    assert text in capsys.readouterr().err


def test_compare_refuses_what_is_no_plan_and_runs_of_no_combination(plan, place, tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"combinations": []}')
    assert main(["plan", "--compare", str(tmp_path), "run"]) == 2
    assert "holds no plan" in capsys.readouterr().err
    star = str(tmp_path / "star")
    assert main(["train", str(place / "my.yaml"), "--topology", "star", "--train.rounds", "1", "--output", star]) == 0
    assert main(["plan", "--compare", str(place / "planned"), star]) == 2
    assert "is of no combination of the plan: topology = star, method = lora" in capsys.readouterr().err


def test_usual_candidates_hold_the_recipe_s_own():
    config = resolve({"topology": {"name": "random_regular", "degree": 2}, "train": {"local_steps": 5}, "codec": {"name": "none"}})
    axes = read_axes(config, {})
    assert axes["topology"][0] == {"name": "random_regular", "degree": 2} and "one_peer_exponential" in axes["topology"]
    assert axes["codec"] == ["none", "int8"] and axes["train.local_steps"] == [5, 10] and axes["trigger"] == ["always"]
    assert read_axis("topologies", "ring, {name: ring}, {name: edge_activation, p: 2e-1}", config) == \
        ["ring", {"name": "edge_activation", "p": 0.2}]


def test_every_interval_has_the_recipe_s_steps_and_refusals_are_counted():
    def check(config):
        if config.codec.name == "int8" and config.topology.name == "ring":
            raise ValueError("not these two")

    axes = {"topology": ["ring", "complete"], "method": ["lora"], "codec": ["none", "int8"], "trigger": ["always"],
            "train.local_steps": [3, 10]}
    found = combine({}, [("train.lr", 0.5)], axes, {"network": {"name": "links", "bandwidth": 10.0}}, 100, check)
    assert len(found.combinations) == 6 and found.refused == {"not these two": 2}
    assert {one.config.train.rounds for one in found.combinations} == {34, 10}
    assert {(one.config.train.lr, one.config.network.params["bandwidth"]) for one in found.combinations} == {(0.5, 10.0)}


def made_up(values: list[float | None]) -> RunData:
    records = [{"round": t, "message_bytes": 100, "ledger": {"seconds": 2.0 * t},
                "eval": {"accuracy": {"mean": value}, "peers": {"accuracy": [value]}}} for t, value in enumerate(values)]
    return RunData(Path("run"), "run", {}, {}, records)


def test_a_run_takes_until_its_first_evaluation_at_the_target():
    assert compare.taken(made_up([0.1, None, 0.5, 0.4, 0.6]), "accuracy", 0.5, True) == {"rounds": 2, "seconds": 4.0, "bytes": 300}
    assert compare.taken(made_up([0.9, 0.5, 0.1]), "accuracy", 0.5, False)["rounds"] == 1
    assert compare.taken(made_up([0.1, 0.2]), "accuracy", 0.5, True) == {"rounds": None, "seconds": None, "bytes": None}
    with pytest.raises(ValueError, match="no evaluation of 'loss'"):
        compare.taken(made_up([0.1]), "loss", 0.5, True)


def test_values_are_shown_as_a_recipe_has_them():
    assert table.text({"name": "event", "threshold": 0.2}) == "{name: event, threshold: 0.2}"
    assert table.text({"name": "ring"}) == table.text("ring") == "ring"
    assert [table.number(one) for one in (None, float("inf"), 12345.6, 0.01234)] == ["-", "-", "12,346", "0.0123"]


def test_where_nothing_reaches_the_target_no_command_is_recommended(plan):
    assert table.lines(plan)[-1] == f"the first of them: {plan['combinations'][0]['command']}"
    nothing = plan | {"combinations": [one | {"rounds": None, "seconds": None, "bytes": None} for one in plan["combinations"]]}
    assert table.lines(nothing)[-1].startswith("none of them is expected to reach it")
    assert "none of them is expected to reach it" in table.markdown(nothing) and "```" not in table.markdown(nothing)
