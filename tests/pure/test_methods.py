"""A method fills the slots of a round, and each can be filled by itself: what that gives, what is refused, and runs from before."""

import json
import shutil

import pytest
import tiny_runs
import torch
import yaml
from made_up_runs import record, write_run

import topologies
from dfl import methods, simulate
from dfl.cli import main
from dfl.config import load, resolve
from dfl.methods import Choice
from dfl.report.groups import place
from dfl.run import build
from dfl.store import manifest
from dfl.store.runs import read_config, read_run

NUM = 6


def start(rank: int = 3):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, rank, 5, generator=generator).repeat(NUM, 1, 1)
    return {"q": (a, torch.randn(NUM, 4, rank, generator=generator))}


def step(factors, t, trains):
    for factor in trains:
        factors["q"]["AB".index(factor)].mul_(1.1).add_(0.01 * (t + 1))


def end_of(*args, **slots):
    graph = topologies.build("erdos_renyi", NUM, p=0.5, seed=1)
    return torch.cat([f.flatten() for f in simulate(*args, graph, start(), step, 8, measure_every=0, **slots).factors["q"]])


def test_a_rule_takes_the_place_of_the_method_s_under_its_schedule():
    alternating = end_of("tad", T=2, rule="decaf")
    assert torch.equal(alternating, end_of("decaf", schedule=Choice("alternate", {"T": 2})))
    assert not torch.equal(alternating, end_of("tad", T=2)) and not torch.equal(alternating, end_of("decaf"))
    # the phases that the topology decides are kept, too
    assert torch.equal(end_of("tad", rule="decaf"), end_of("lora", schedule="automatic", rule="decaf"))
    assert torch.equal(end_of("ffa", rule=Choice("decaf", {"split": "left"}), schedule="both"), end_of("decaf", split="left"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_is_what_its_slots_say(name):
    """Spelled out beside any other method, they are the same choices."""
    chosen = methods.fill(name)
    assert methods.fill("lora", {}, {slot: chosen[slot] for slot in ("rule", "schedule")}) == chosen


def test_parameters_belong_to_whoever_declares_them():
    filled = methods.fill("tad", {"T": 5}, {"rule": Choice("decaf", {"split": "left"})})
    assert filled["schedule"] == Choice("automatic", {"T": 5}) and filled["rule"] == Choice("decaf", {"split": "left"})
    for params, slots, said in (
            ({"split": "left"}, {"rule": Choice("decaf")}, "method.split = 'left': 'tad' has no such parameter; rule.split is one of "
                                                           "'decaf'; allowed: T, cap, ends, exchange, pattern, theta"),
            ({"thet": 0.1}, {}, "method.thet = 0.1: 'tad' has no such parameter .did you mean 'theta'"),
            ({}, {"rule": Choice("decaf", {"T": 5})}, "rule.T = 5: 'decaf' has no such parameter; allowed: split, gauge"),
            ({}, {"schedule": Choice("alternate", {"U": 5})}, "schedule.U = 5: 'alternate' has no such parameter")):
        with pytest.raises(ValueError, match=said):
            methods.fill("tad", params, slots)


@pytest.mark.parametrize("slots, said", [
    ({"rule": Choice("tad")}, "rule.name = 'tad' is a method, not a rule: give it as method; allowed: average, lora_a2"),
    ({"rule": Choice("decav")}, "rule.name = 'decav' is not known .did you mean 'decaf'"),
    ({"rule": Choice("decaf", {"split": "right"})}, "rule.split = 'right' is not allowed"),
    ({"schedule": Choice("alternate", {"T": 0})}, "schedule.T = 0 is not allowed"),
    ({"rule": Choice("lora_a2")}, "schedule.name = 'automatic' exchanges 'pairs', which rule 'lora_a2' cannot mix"),
    ({"rule": Choice("flora")}, "rule.name = 'flora' needs every peer to receive from every other"),
    ({"rule": Choice("plora"), "trigger": Choice("event", {"threshold": 1})}, "which 'tad' with rule 'plora' cannot have")])
def test_what_does_not_go_together_is_refused_by_slot_and_reason(slots, said):
    with pytest.raises(ValueError, match=said):
        end_of("tad", **slots)


def test_a_rule_that_is_no_method_is_told_from_one():
    with pytest.raises(ValueError, match="method.name = 'average' is a rule, not a method: give it as rule, beside a method"):
        methods.fill("average")


def test_a_schedule_that_makes_the_method_keeps_it_under_another_rule():
    """RoLoRA exchanges one factor alone, from which no rule makes products."""
    with pytest.raises(ValueError, match="exchanges 'active', which rule 'decaf' cannot mix"):
        end_of("rolora", rule="decaf")
    assert torch.equal(end_of("rolora", rule="decaf", schedule="both"), end_of("decaf"))


def test_unequal_ranks_ask_the_rule_that_mixes():
    known = methods.Context(build._layout_before_loading(resolve({})), ranks=(1, 2))
    methods.build("lora", known, {}, {"rule": Choice("decaf")})
    with pytest.raises(ValueError, match="rule.name = 'average' cannot mix peers of unequal ranks .*; allowed: .*decaf.*, or one"):
        methods.build("decaf", known, {}, {"rule": Choice("average")})


@pytest.mark.parametrize("fields, said", [
    ({"lora.adapter": "sb", "method": "fed_sb", "rule": "decaf"}, "which rule.name = 'decaf' does not mix; allowed: average"),
    ({"lora.adapter": "sb", "method": "lora"}, "trains cores between frozen bases, which method.name = 'lora' does not mix"),
    ({"lora.adapter": "ravan", "method": "ravan", "rule": "average"}, "which rule.name = 'average' does not mix; allowed: ravan"),
    ({"method": "lora", "rule": "dora"}, "rule.name = 'dora' needs lora.adapter = 'dora', got 'lora'"),
    ({"method": "tad", "rule": "{name: decaf, rank: 3}"}, "rule.rank is set by lora.rank"),
    ({"method": "lora", "schedule": "{name: automatic, topology: 3}"}, "schedule.topology is set by topology")])
def test_adapters_and_what_the_run_sets_are_checked_in_each_slot(fields, said):
    with pytest.raises(ValueError, match=said):
        build.check(load(None, [word for key, value in fields.items() for word in (f"--{key}", value)]))


def test_a_slot_takes_a_name_or_a_name_with_parameters():
    for slot, value, params in (("schedule", "alternate", {}), ("schedule", {"name": "alternate", "T": 3}, {"T": 3}),
                                ("rule", {"name": "decaf", "split": "left"}, {"split": "left"})):
        config = resolve({"method": "tad", slot: value})
        assert getattr(config, slot).params == params
        build.check(config)
    assert resolve({}, [("method", "tad"), ("schedule", "alternate"), ("schedule.T", 3)]).schedule.params == {"T": 3}


@pytest.mark.parametrize("given", [{"rule": "tad"}, {"rule": {"name": "decaf"}}, {"rule": "decaf", "method": None}])
def test_a_rule_without_a_method_is_refused_with_what_to_write(given):
    """`rule: decaf` was the whole method once; with the default method it would be another run."""
    with pytest.raises(ValueError, match="takes the place of the rule of a method, and no method is given: .*give it as method "
                                         "[(]method: (tad|decaf)[)]"):
        resolve(given)
    assert resolve({"method": "tad"}, [("rule", "decaf")]).rule.name == "decaf"
    assert resolve({"method": "tad", "rule": None}).rule is None


def test_the_list_says_what_fills_the_slots(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "  rolora       Train B and A in turn" in said
    assert "    rule: average, schedule: {name: alternate, T: 1, exchange: active}" in said
    assert "rules (rule in a recipe):" in said and "schedules (schedule in a recipe):" in said


def test_a_report_tells_runs_apart_by_the_slots_that_vary(tmp_path):
    runs = [read_run(write_run(tmp_path / f"{k}", [record(1, [0.5, 0.5])], method="tad", rule=rule))
            for k, rule in enumerate((None, "decaf", {"name": "florist", "tau": 0.9}))]
    members, notes = place(runs)
    assert [m.method for m in members] == ["tad", "tad rule=decaf", "tad rule=florist rule.tau=0.9"]
    assert {m.setting for m in members} == {""} and not notes


# -- whole runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("methods"))


def words(root, output, **fields):
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **fields)]


@pytest.mark.long
def test_a_run_with_a_rule_of_its_own_resumes_and_its_baseline_trains_alone(root, tmp_path):
    fields = {"method": "{name: tad, T: 1}", "rule": "decaf", "baseline": "local", "train__rounds": 3, "schedule": "null"}
    assert main(words(root, tmp_path / "whole", **fields)) == 0
    found = read_run(tmp_path / "whole")
    assert [line.get("trains") for line in found.records] == [None, "B", "A", "B"]
    assert main(words(root, tmp_path / "run", **fields | {"train__rounds": 2, "baseline": "null"})) == 0
    assert main([*words(root, tmp_path / "run", **fields | {"baseline": "null"}), "--resume"]) == 0
    assert tiny_runs.adapter_digests(tmp_path / "run") == tiny_runs.adapter_digests(tmp_path / "whole")
    # the schedule of the run is not that of local training
    both = fields | {"method": "lora", "schedule": "both", "rule": "null", "train__rounds": 1}
    assert main(words(root, tmp_path / "both", **both)) == 0
    alone = read_run(tmp_path / "both").baseline
    assert alone.config["method"] == {"name": "local"} and alone.config["schedule"] is None and alone.records[-1]["message_bytes"] == 0


@pytest.mark.long
@pytest.mark.parametrize("slots", [{"method": "tad"}, {"method": "lora", "schedule": "automatic"}])
def test_a_run_made_longer_keeps_the_phases_it_had_whoever_fills_the_schedule(root, tmp_path, slots):
    def phases(output):
        return [line.get("trains") for line in read_run(output).records][1:]

    assert main(words(root, tmp_path / "run", **slots, train__rounds=4)) == 0
    before = phases(tmp_path / "run")
    assert main([*words(root, tmp_path / "run", **slots, train__rounds=9), "--resume"]) == 0
    field = "schedule" if "schedule" in slots else "method"
    assert read_run(tmp_path / "run").config[field]["ends"] == [4] and phases(tmp_path / "run")[:4] == before
    assert main([*words(root, tmp_path / "run", **slots, train__rounds=10), "--resume"]) == 0
    assert read_run(tmp_path / "run").config[field]["ends"] == [4, 9]


# -- runs from before `method` ---------------------------------------------------------------------------------------------------


def as_before(run) -> None:
    """A run's folder as it was written while the method stood under `rule` and manifests had version 2."""
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    del tree["rule"]
    tree = {"rule" if key == "method" else key: value for key, value in tree.items()}
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    about = json.loads((run / "run.json").read_text())
    about["config"], about["facts"]["rule"] = tree, about["facts"].pop("method")
    (run / "run.json").write_text(json.dumps(about))
    for path in run.glob("checkpoints/*/manifest.json"):
        signed = json.loads(path.read_text()) | {"version": 2}
        path.write_text(json.dumps(signed | {"self": manifest._digest_of(signed)}))


OLD = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": 3, "checkpoint__every": 1, "checkpoint__keep": 3}


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "run"
    assert main(words(root, output, **OLD)) == 0
    return output


@pytest.mark.parametrize("by", ["arguments", "its recipe", "its recipe, longer"])
def test_a_run_of_the_format_before_goes_on_to_the_same_bits(root, done, tmp_path, by):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for name in ("round-00002", "round-00003"):
        shutil.rmtree(run / "checkpoints" / name)
    as_before(run)
    assert read_config(run).method.params == {"T": 2} and read_run(run).config["method"] == {"name": "tad", "T": 2}
    given = words(root, run, **OLD) if by == "arguments" else ["train", str(run / "recipe.yaml"), "--output", str(run)]
    assert main([*given, *(["--train.rounds", "4"] if "longer" in by else []), "--resume"]) == 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"] == {"name": "tad", "T": 2}
    kept = run / "checkpoints" / "round-00003"
    assert all(path.read_bytes() == (done / "checkpoints" / "round-00003" / path.relative_to(kept)).read_bytes()
               for path in kept.rglob("*.safetensors"))
    assert json.loads((kept / "manifest.json").read_text())["version"] == manifest.VERSION == 4


def test_a_run_of_the_format_before_is_evaluated_exported_and_reported(done, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    as_before(run)
    assert main(["eval", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    assert "tad" in (run / "report.md").read_text() and "method: T" in (run / "report.md").read_text()
    assert main(["export", str(run), "--peer", "0"]) == 0
    assert "tad, T = 2" in next((run / "exports").glob("*/README.md")).read_text()


def test_only_the_recipe_of_a_run_is_read_as_one_from_before(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    as_before(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="give it as method"):
        load(tmp_path / "mine.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "recipe.yaml").write_text("method: tad\nrule: decaf\n")
    assert load(tmp_path / "folder" / "recipe.yaml").rule.name == "decaf"


def test_a_sweep_of_the_format_before_goes_on(root, tmp_path, capsys):
    recipe = tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "x", train__rounds=1).to_dict()
    recipe = {key: value for key, value in recipe.items() if key not in ("output", "rule", "method")}
    path = tmp_path / "sweep.yaml"
    grid = {"method": ["lora", {"name": "adf", "T": 2}]}
    path.write_text(yaml.safe_dump({"recipe": recipe, "grid": grid, "output": str(tmp_path / "out")}))
    assert main(["sweep", str(path), "--index", "0"]) == 0
    listed = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert listed.pop("version") == 2
    listed["axes"] = ["rule"]
    listed["runs"] = [run | {"fields": {"rule": run["fields"]["method"]}} for run in listed["runs"]]
    listed["recipe"] |= {"rule": "lora"}
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(listed))
    as_before(tmp_path / "out" / "lora")
    before = tiny_runs.adapter_digests(tmp_path / "out" / "lora")
    capsys.readouterr()
    assert main(["sweep", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:3] == ["0", "finished", "lora"] and said[1].split()[:3] == ["1", "waiting", "adf-T=2"]
    assert main(["sweep", str(path), "--index", "1"]) == 0
    assert tiny_runs.adapter_digests(tmp_path / "out" / "lora") == before
