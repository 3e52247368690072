"""The evidence study: its grid, pairs, search for rates, verdicts, resumption, and the faster forward pass."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # behind tests, which have an every_rule as well

from evidence import cells, findings, grid, page, runner, tables  # noqa: E402

from dfl import simulate  # noqa: E402
from dfl.adapters.layout import make_layout  # noqa: E402
from dfl.cli import main  # noqa: E402
from dfl.config import resolve  # noqa: E402
from dfl.config.recipes import parse_overrides, read_yaml  # noqa: E402
from dfl.config.topology import build_topology  # noqa: E402
from dfl.methods import METHODS  # noqa: E402
from dfl.rules import RULES  # noqa: E402
from dfl.run.build import check  # noqa: E402
from topologies import build  # noqa: E402

SPEC = importlib.util.spec_from_file_location("evidence_script", ROOT / "benchmarks" / "evidence.py")
evidence = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evidence)


@pytest.fixture(autouse=True)
def plugins_of_this_study_only_here(monkeypatch):
    """What the plug-ins of the runs change is as before after each test: BERT's forward pass, the tables."""
    monkeypatch.setenv("DFL_DATA", "/data")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(BertForSequenceClassification, "forward", BertForSequenceClassification.forward)
    for name in [name for name in sys.modules if name.startswith("benchmarks.evidence")]:
        monkeypatch.delitem(sys.modules, name)
    rules, known = dict(RULES), dict(METHODS)
    yield
    for table, before in ((RULES, rules), (METHODS, known)):
        for name in set(table) - set(before):
            del table[name]
    for name in [name for name in sys.modules if name.startswith("benchmarks.evidence")]:
        del sys.modules[name]


def result(cell: grid.Cell, accuracy: float, **more) -> dict:
    """A finished cell as it is stored."""
    scores = {"mean": accuracy, "min": accuracy / 2, "max": accuracy, "consensus": accuracy}
    curve = [{"round": 0, "message_bytes": 0, **scores}, {"round": cell.rounds, "message_bytes": 1000, **scores}]
    return cells.describe(cell) | {"curve": curve, "final": curve[-1], "test": scores if cell.tested else None,
                                   "message_bytes": 1000, "diagnostics": [], "last_third": {}} | more


def committed() -> dict[str, dict]:
    return json.loads((ROOT / "benchmarks" / "results" / "evidence.json").read_text())["cells"]


def everything(found=None, phases=()) -> dict[str, dict]:
    """All cells of the grid with some accuracy: what the plan gives until it gives nothing new."""
    found = dict(found or {})
    while new := [cell for cell in grid.plan(found, phases) if cell.name not in found]:
        found |= {cell.name: result(cell, 0.5 + 0.001 * cell.seed / 100) for cell in new}
    return found


def config_of(cell: grid.Cell):
    command = cells.train_command(cell, "runs/x")
    return resolve(read_yaml(ROOT / command[2]), parse_overrides([word for word in command[3:] if word != "--resume"]))


def test_every_cell_is_a_recipe_that_a_run_accepts():
    """Each method, and each setting, once: names, parameters, slots, ranks and adapters fit each other."""
    reported = {}
    for cell in grid.plan(everything()):
        reported.setdefault((cell.method, cell.setting), cell)
    assert {method for method, _ in reported} == set(grid.METHODS)
    assert {setting for _, setting in reported} == {"", *grid.CLAIMS}
    for cell in reported.values():
        check(config_of(cell))


def test_the_regime_is_the_protocols():
    config = config_of(grid.Cell("main", "trec6", "tad15", 0.02, 1, 1e-3, 4))
    assert (config.peers, config.model.layers, config.model.head_std, config.lora.head) == (10, 3, 0.3, "frozen")
    train = config.train
    assert (train.rounds, train.local_steps, train.batch_size, train.state) == (90, 20, 16, "fresh")
    assert (train.lr, train.lr_ratio.A, train.lr_ratio.B, train.autocast) == (1e-3, 1.0, 4, "off")
    assert config.data.valid is None and config.data.valid_fraction == 0.1 and "test" not in str(config.to_dict())
    assert all(grid.ROUNDS % (2 * T) == 0 for T in (1, 3, 5, 15))


@pytest.mark.long
def test_methods_of_a_pair_share_graph_data_and_start():
    """What a seed fixes: everything of the recipe but the method, its own overrides and rates."""
    cells_of = {}
    for cell in grid.plan(everything()):
        if cell.phase == "main":
            cells_of.setdefault((cell.task, cell.p, cell.seed), []).append(cell)
    assert len(cells_of) == 2 * 3 * 3 + 2 * 2  # seeds 3 and 4 at p = 0.02
    for group in cells_of.values():
        trees = [config_of(cell).to_dict() for cell in group]
        for tree in trees:
            for key in (grid.METHOD_FIELD, "train", "schedule", "output"):
                tree.pop(key, None)
        assert all(tree == trees[0] for tree in trees)
    one, other = (config_of(grid.Cell("main", "trec6", "lora", 0.1, seed, 2e-3, 1)) for seed in (0, 1))
    assert (build_topology(one).matrix(0) != build_topology(other).matrix(0)).any()


def test_rates_are_chosen_on_a_seed_that_no_reported_cell_has_and_never_see_the_test_file():
    for cell in grid.plan(everything()):
        assert cell.tested == (cell.phase != "rates") == (cell.seed != grid.SEED_RATES)
        assert any(command.startswith("dfl eval") for command in cells.describe(cell)["commands"]) == cell.tested
        if cell.phase == "rates":
            assert (cell.p, cell.rounds) == (0.1, 30)


def test_the_order_is_rates_then_core_then_what_decides():
    found = everything()
    names = list(dict.fromkeys(cell.name for cell in grid.plan(found)))
    phases = [found[name]["phase"] for name in names]
    first = phases.index("main")
    assert set(phases[:first]) == {"rates"} and all("trec6" in name for name in names[:first])
    assert names[first:first + 5] == [f"trec6-{m}-p0.02-s0" for m in ("lora", "tad5", "ffa", "tad15", "decaf")]
    assert names[first + 20] == "trec6-lora-p0.02-s2"
    assert len(names) == len(found)


def test_the_other_claims_are_looked_at_after_as_many_steps_as_rates_are():
    """And on graphs that speak about as often as each other: ten messages a round, nine where links are there at random,
    25 in three rounds of Base-2's.
    """
    claims = {cell.name: cell for cell in grid.plan(everything(), ("claims",)) if cell.phase == "claims"}.values()
    steps = {cell.rounds * cell.overrides()["train.local_steps"] for cell in claims}
    assert steps == {600} and {(cell.p, cell.seed) for cell in claims} == {(0.1, 0), (0.1, 1), (0.1, 2)}
    messages = {}
    for cell in claims:
        if (cell.setting, cell.seed) == ("short", 0) and cell.method in ("lora", *grid.ON_GRAPHS):
            config = config_of(cell)
            topology, every = build_topology(config), 2 if config.trigger.name == "periodic" else 1
            sent = [((matrix := topology.matrix(t)) != 0).sum() - (matrix.diagonal() != 0).sum() for t in range(200)]
            messages[cell.method] = sum(sent) / 200 / every
    expected = dict.fromkeys(grid.ON_GRAPHS, 10) | {"lora": 9, "lora-base2": 25 / 3}
    assert messages == pytest.approx(expected, rel=0.1)


def test_no_reported_cell_before_the_rates_of_its_method():
    assert all(cell.phase == "rates" for cell in grid.plan({}))
    some = {cell.name: result(cell, 0.5) for cell in grid.plan({}) if cell.method != "tad5"}
    while new := [cell for cell in grid.plan(some, ("core", "rest"))
                  if cell.phase == "rates" and cell.method != "tad5" and cell.name not in some]:
        some |= {cell.name: result(cell, 0.5) for cell in new}
    methods = {cell.method for cell in grid.plan(some) if cell.phase != "rates" and cell.task == "trec6"}
    assert "lora" in methods and "local" in methods and not methods & {"tad5", "tad5-head", "decaf-alternating"}


@pytest.mark.parametrize("peak, count", [((2e-3, 4), 5), ((2e-3, 64), 6), ((1e-3, 1), 6), ((8e-3, 16), 7),
                                         ((5e-4, 64), 7)])
def test_the_search_for_rates_finds_a_peak_and_takes_so_many_cells(peak, count):
    def height(point):
        return -sum(abs(torch.tensor(a / b).log()) for a, b in zip(point, peak, strict=True)).item()

    scores = {}
    while (state := findings.search(scores)).chosen is None:
        (new,) = [[point for point in state.points if point not in scores]]
        assert new, "the search waits for nothing"
        scores |= {point: height(point) for point in new}
    assert state.chosen == pytest.approx(peak) and len(scores) == count


def test_a_diverged_cell_counts_as_zero_and_ties_go_to_the_smaller_rates():
    cell = next(grid.plan({}))
    assert findings.validation(cells.describe(cell) | {"diverged": "peer 3"}) == 0.0
    scores = dict.fromkeys(product((1e-3, 2e-3, 4e-3), (1, 4, 16)), 0.5) | {(5e-4, 1): 0.5}
    assert findings.search(scores).chosen == (5e-4, 1)


def cells_with(values: dict[str, list[float]], p: float = 0.02) -> dict[str, dict]:
    """Reported cells: by method its accuracy in percent, seed by seed."""
    found = {}
    for method, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            cell = grid.Cell("main", "trec6", method, p, seed, 2e-3, 1)
            found[cell.name] = result(cell, accuracy / 100)
    return found


def test_differences_are_taken_within_pairs():
    found = cells_with({"lora": [60, 50, 70], "tad5": [61, 52]})
    assert findings.differences(found, findings.Place("trec6", 0.02), "tad5", "lora") == pytest.approx([1, 2])
    assert findings.differences(found, findings.Place("trec6", 0.1), "tad5", "lora") == []


def test_the_interval_of_tad_is_chosen_on_validation_over_the_seeds_that_both_have():
    place = findings.Place("trec6", 0.02)
    assert findings.chosen_interval(cells_with({"tad5": [60, 50, 90], "tad15": [58, 55]}), place) == "tad15"
    assert findings.chosen_interval(cells_with({"tad5": [60, 50]}), place) == "tad5"  # the only one that has been run
    assert findings.chosen_interval(cells_with({"lora": [60]}), place) is None


def test_graphs_are_compared_again_on_the_other_data_without_more_cells_than_that_takes():
    again = {cell.method for cell in grid.plan(everything()) if (cell.task, cell.setting) == ("sst2", "short")}
    assert again == {"lora-ring", "lora-one-peer", "lora-base2"}
    place = findings.Place("sst2", 0.1, "short")
    asked = [(one, other) for where, one, other in tables.orderings() if where == place]
    assert asked == [("lora-one-peer", "lora-ring"), ("lora-base2", "lora-ring")]


@pytest.mark.parametrize("tad, verdict", [([62, 52.5, 72.4], "held"), ([62, 50, 72], "refuted"),
                                          ([61, 59, 70.5], "not decided"),
                                          ([62, 52], "not decided")])
def test_the_criterion_where_links_are_sparse(tad, verdict):
    found = cells_with({"lora": [60, 50, 70], "ffa": [55, 45, 60], "tad5": tad, "tad15": [0] * len(tad)})
    said = findings.expectation(found, "trec6", 0.02)
    assert said.verdict == verdict and "ahead" in said.claim and "tad5 - lora" in said.why


def test_where_ffa_is_far_below_tad_is_expected_behind():
    found = cells_with({"lora": [60, 50, 70], "ffa": [30, 30, 30], "tad5": [58, 47.6, 68.2], "tad15": [0, 0, 0]})
    said = findings.expectation(found, "trec6", 0.02)
    assert said.verdict == "held" and "behind" in said.claim and "50 %" in said.claim


@pytest.mark.parametrize("p, points, verdict", [(0.1, [0.1, 0.2, -0.1], "held"), (0.1, [5, 5.2, 5.1], "refuted"),
                                                (0.1, [5, -5, 1], "not decided"),
                                                (0.5, [-2, -3, -2.5], "held"),
                                                (0.5, [2, 3, 2.5], "refuted"), (0.5, [2, -3], "not decided")])
def test_the_criteria_where_links_are_many(p, points, verdict):
    found = cells_with({"lora": [50] * len(points), "tad15": [50 + d for d in points], "tad5": [0] * len(points)}, p)
    assert findings.expectation(found, "trec6", p).verdict == verdict


def test_fewer_than_three_pairs_decide_nothing():
    assert findings.ordering("a > b", [10.0, 10.1]).verdict == "not decided"
    assert findings.ordering("a > b", [10.0, 10.1, 10.2]).verdict == "held"
    assert findings.ordering("a > b", [-10.0, -10.1, -10.2]).verdict == "refuted"
    assert findings.ordering("a > b", []).why == "no pair"


def test_the_parity_of_the_last_phase_is_read_from_one_run():
    found = cells_with({"tad15": [60, 50, 70]})
    for cell, before in zip(found.values(), (0.5, 0.41, 0.6), strict=True):
        cell["curve"].insert(1, {**cell["curve"][0], "round": 75, "mean": before})
    said = findings.last_phase(found, findings.Place("trec6", 0.02), "tad15", 75, 90)
    assert said.verdict == "held" and said.why.startswith("+10.0, +9.0, +10.0")
    assert findings.last_phase({}, findings.Place("trec6", 0.02), "tad15", 75, 90).verdict == "not decided"


def test_a_gain_that_grows_is_told_from_one_that_does_not():
    found = {}
    for setting, gains in (("short", (5, 6, 7)), ("half", (1, 2.1, 3.2))):
        for seed, gain in enumerate(gains):
            for method, accuracy in (("lora", 60 + 9 * seed), ("flora_na", 60 + 9 * seed + gain)):
                cell = grid.Cell("claims", "trec6", method, 0.1, seed, 2e-3, 1, 30, setting)
                found[cell.name] = result(cell, accuracy / 100)
    short, half = (findings.Place("trec6", 0.1, setting) for setting in ("short", "half"))
    said = findings.growth("larger at one", found, short, half, "flora_na", "lora")
    assert said.verdict == "held" and said.why.startswith("+4.0, +3.9, +3.8") and said.claim == "larger at one"
    assert findings.growth("", found, half, short, "flora_na", "lora").verdict == "refuted"
    assert any(verdict[1:] == said[1:] and "90 % of one class than" in verdict.claim for verdict in tables.verdicts(found))


def test_one_merge_at_the_end_is_compared_with_the_best_peer_of_the_same_run():
    found = cells_with({"lora": [70, 68, 69]})
    for gain, cell in zip((6, 7, 8), found.values(), strict=True):
        cell["test"] = {"mean": 0.5, "min": 0.4, "max": 0.6, "consensus": 0.6 + gain / 100}
    (said,) = [verdict for verdict in tables.verdicts(found) if "its best peer" in verdict.claim and tables.with_pairs(verdict)]
    assert said.claim == "trec6, p = 0.02: consensus of lora > its best peer"
    assert said.verdict == "held" and said.why.startswith("+6.0, +7.0, +8.0")


def test_peers_that_end_with_one_merge_are_compared_with_the_consensus_alone():
    cells_at = [grid.Cell("claims", "trec6", method, 0.1, seed, 0.002, 1, setting="short") for method in ("lora", "lora-late")
                for seed in range(3)]
    found = {cell.name: result(cell, 0.7) for cell in cells_at}
    for cell in found.values():
        cell["test"] |= {"consensus": 0.8} if cell["method"] == "lora" else {"mean": 0.78, "consensus": 0.78}
    assert [row[-2] for row in tables.result_rows(found)] == ["–", "–"]
    (said,) = [verdict for verdict in tables.verdicts(found) if "consensus of lora-late" in verdict.claim]
    assert said.why.startswith("-2.0, -2.0, -2.0")


def test_what_the_diagnostics_say_is_a_row_a_method():
    found = cells_with({"lora": [60, 50], "tad5": [62]})
    for cell in found.values():
        cell["diagnostics"] = [{"disagreement": 0.9, "trained": "B"},
                               {"disagreement": 0.4 + cell["seed"] / 10, "trained": "B" if cell["method"] == "tad5" else "A+B",
                                "gradient_A": 0.1, "gradient_B": 0.4}]
        cell["last_third"] = {"cross_term_relative": 0.02}
        cell["final"] = cell["final"] | {"own": cell["final"]["mean"] + 0.1}
    place = "trec6, p = 0.02"
    assert tables.mechanism_rows(found) == [[place, "lora", "0.45", "0.020", "–", "+10.0"],
                                            [place, "tad5", "0.40", "0.020", "0.25", "+10.0"]]


def test_a_failed_cell_is_left_out_of_a_call_and_begun_again_in_the_next(tmp_path):
    begun = []

    def work(cell, out, children):
        begun.append(cell.name)
        if len(begun) == 2:
            raise RuntimeError("a disk is full")
        return result(cell, 0.5)

    assert runner.run(tmp_path, 1, None, ("core",), "-lora-", work) == 1
    assert len(begun) == 3 and len(runner.stored(tmp_path)) == 2
    assert runner.run(tmp_path, 1, None, ("core",), "-lora-", work) == 0
    # five for the rates and the one beyond, as ties go down; p = 0.02 and 0.1 with two seeds
    assert begun[3] == begun[1] and len(set(begun)) == len(begun) - 1 == len(runner.stored(tmp_path)) == 6 + 4
    assert not list(tmp_path.glob("cells/.*"))


def test_a_stopped_cell_is_not_done_and_goes_on_in_the_next_call(tmp_path):
    begun = []

    def work(cell, out, children):
        begun.append(cell.name)
        if len(begun) == 2:
            children.stop()
            raise cells.StoppedError
        return result(cell, 0.5)

    assert runner.run(tmp_path, 1, None, ("core",), "-lora-.*lr0.002", work) == 75
    assert len(begun) == 2 and len(runner.stored(tmp_path)) == 1
    assert runner.run(tmp_path, 1, None, ("core",), "-lora-.*lr0.002", work) == 0
    assert begun[2] == begun[1] and len(begun) == 4


def test_a_child_is_told_to_stop_and_none_is_begun_afterwards():
    children = cells.Children()
    threading.Timer(0.5, children.stop).start()
    with pytest.raises(cells.StoppedError):
        children.run("timeit", "-n1", "-r1", "import time; time.sleep(60)")
    with pytest.raises(cells.StoppedError):
        children.run("timeit", "-n1", "-r1")


def test_the_run_of_a_killed_runner_ends_with_it(tmp_path):
    note = tmp_path / "pid"
    sleep = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(170)"
    script = f"from evidence import cells; cells.Children().run('timeit', '-n1', '-r1', {sleep!r})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    with subprocess.Popen([sys.executable, "-c", script], env=env) as runner_process:
        until(lambda: note.exists() and note.read_text())
        run = Path("/proc", note.read_text())
        assert run.exists()
        runner_process.kill()
    until(lambda: not run.exists() or "Z" in (run / "stat").read_text().split()[2])


def until(true) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within half a minute")


@pytest.mark.long
def test_jobs_run_beside_each_other_and_the_budget_stops_them(tmp_path):
    together, seen = threading.Barrier(2, timeout=20), []

    def work(cell, out, children):
        seen.append(cell.name)
        if len(seen) <= 2:
            together.wait()
            return result(cell, 0.5)
        while not children.stopped:
            pass
        raise cells.StoppedError

    assert runner.run(tmp_path, 2, 3.0, ("core",), "", work) == 75
    assert len(runner.stored(tmp_path)) == 2 and len(seen) == 4


def test_two_runners_do_not_work_in_one_folder(tmp_path):
    def work(cell, out, children):
        with pytest.raises(SystemExit, match="another runner"):
            runner.run(out, 1, None, ("core",), "")
        raise RuntimeError("enough")

    assert runner.run(tmp_path, 1, None, ("core",), "lr0.002-B1$", work) == 1


def test_stored_figures_are_short_and_whole():
    value = cells.rounded({"a": [0.123456789, 3], "b": {"c": "text", "d": None, "e": 1e-12 / 3}})
    assert json.dumps(value) == '{"a": [0.123457, 3], "b": {"c": "text", "d": null, "e": 3.33333e-13}}'


class InProcess(cells.Children):
    """Runs `dfl` here, where a test may look into it."""

    def run(self, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(words[1:]))
        return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A folder like that of the study: a random BERT of four layers, and made-up questions of six classes."""
    tiny_models.save(tmp_path / "minilm-l6-fp16", "bert", layers=4)
    (tmp_path / "trec6").mkdir()
    for name, copies in (("train", 60), ("test", 5)):
        rows = [f"{tiny_models.WORDS[2 * label + k % 2]} {tiny_models.WORDS[k % 20]}\t{'ABCDEF'[label]}\tx"
                for k in range(copies) for label in range(6) if label or k % 3]
        (tmp_path / "trec6" / f"{name}.tsv").write_text("\n".join(["question\tcoarse\tfine", *rows]) + "\n")
    monkeypatch.setenv("DFL_DATA", str(tmp_path))
    short = {"train.local_steps": 2, "train.batch_size": 4, "eval.every": 4, "model.layers": 3}
    monkeypatch.setattr(grid, "REGIME", grid.REGIME | short)
    return tmp_path


@pytest.mark.long
def test_a_cell_from_its_run_to_what_is_stored(tiny_data):
    """TAD with phases of five rounds, eleven in all: curve, diagnostics where phases end, the test file at the end."""
    cell = grid.Cell("main", "trec6", "tad5", 0.5, 0, 1e-2, 4, rounds=11)
    found = cells.execute(cell, tiny_data / "out", InProcess())
    assert [point["round"] for point in found["curve"]] == [0, 4, 8, 11] and found["final"] == found["curve"][-1]
    assert found["final"]["message_bytes"] == found["message_bytes"] > 0 and 0 <= found["final"]["own"] <= 1
    assert [(line["round"], line["trained"]) for line in found["diagnostics"]] == [(5, "B"), (10, "A"), (11, "B")]
    for line in found["diagnostics"]:
        assert line["gradient_A"] > 0 and line["gradient_B"] > 0 and 0 < line["disagreement"] < 1
    assert set(found["test"]) == {"mean", "min", "max", "consensus"} and found["test"]["min"] <= found["test"]["mean"]
    assert 0 < found["last_third"]["cross_term_relative"] < 1
    assert found["versions"]["torch"] and found["hardware"] and found["started"] and found["resumed"] == []
    assert str(tiny_data) not in json.dumps(found), "no path of this machine"


def test_a_cell_that_chooses_a_rate_is_not_tested_and_one_that_diverges_is_stored(tiny_data):
    cell = grid.Cell("rates", "trec6", "lora", 0.1, 100, 1e-2, 1, rounds=2)
    found = cells.execute(cell, tiny_data / "out", InProcess())
    assert found["test"] is None and findings.validation(found) == found["curve"][-1]["mean"]
    broken = cells.execute(cell._replace(lr=1e38), tiny_data / "out", InProcess())
    assert "peer" in broken["diverged"] and findings.validation(broken) == 0


def test_what_a_recipe_refuses_is_no_result(tiny_data):
    cell = grid.Cell("rates", "trec6", "lora", 7.0, 100, 1e-2, 1, rounds=2)
    with pytest.raises(RuntimeError, match="ended with 2"):
        cells.execute(cell, tiny_data / "out", InProcess())


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
                        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).eval()


def test_the_packed_forward_pass_has_the_logits_and_gradients_of_the_plain_one():
    model, plain = tiny_bert(), BertForSequenceClassification.forward
    batch = {"input_ids": torch.randint(1, 50, (5, 9)), "token_type_ids": torch.randint(0, 2, (5, 9)),
             "attention_mask": (torch.arange(9) < torch.tensor([9, 1, 4, 7, 2])[:, None]).long()}
    found = []
    packed = importlib.import_module("benchmarks.evidence.packed").forward
    assert BertForSequenceClassification.forward is packed, "the plug-in is in place"
    for forward in (plain, packed):
        model.zero_grad()
        logits = forward(model, **batch).logits
        logits.logsumexp(-1).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (logits, gradients), (fewer, theirs) = found
    torch.testing.assert_close(fewer, logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == theirs.keys()
    for name in gradients:
        torch.testing.assert_close(theirs[name], gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_balanced_rule_averages_factors_and_evens_their_norms():
    """Its product is that of plain averaging; B^T B = A A^T; and a product of zero keeps its A."""
    importlib.import_module("benchmarks.evidence.balanced")
    torch.manual_seed(0)
    factors = {"layer": (torch.randn(3, 2, 6), 5 * torch.randn(3, 4, 2)),
               "new": (torch.randn(3, 2, 6), torch.zeros(3, 4, 2))}
    graph = build("complete", 3)
    plain, even = (simulate(method, graph, factors, lambda *_: None, 1).factors
                   for method in ("lora", "balanced_average"))
    for (a, b), (own_a, own_b) in zip(plain.values(), even.values(), strict=True):
        torch.testing.assert_close(own_b @ own_a, b @ a, rtol=1e-4, atol=1e-5)
    a, b = even["layer"]
    torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-4, atol=1e-4)
    assert torch.equal(even["new"][0], plain["new"][0])


def test_the_recorder_measures_where_a_phase_ends_but_not_too_often():
    wanted = importlib.import_module("benchmarks.evidence.recorder").wanted

    def measured(T, rounds):
        last, found = 0, []
        for done in range(1, rounds + 1):
            if wanted(done, last, rounds, lambda t: "B" if T is None or t // T % 2 == 0 else "A"):
                last = done
                found.append(done)
        return found

    assert measured(15, 90) == [15, 30, 45, 60, 75, 90]
    assert measured(3, 20) == [6, 12, 18, 20] and measured(1, 11) == [5, 10, 11]
    assert measured(None, 40) == [15, 30, 40]


def test_disagreement_is_relative_to_the_products():
    recorder = importlib.import_module("benchmarks.evidence.recorder")
    layout = make_layout([("layer", 2, 3, 4, 2.0)])
    torch.manual_seed(0)
    x = torch.randn(3, layout.size)
    deltas = torch.stack([2.0 * row[6:].view(4, 2) @ row[:6].view(2, 3) for row in x])
    size = deltas.square().sum((1, 2)).mean()
    away = (deltas - deltas.mean(0)).square().sum((1, 2)).mean()
    found = recorder.disagreement(x, layout)
    assert found["product"] == pytest.approx(size.sqrt().item(), rel=1e-5)
    assert found["disagreement"] == pytest.approx((away / size).sqrt().item(), rel=1e-5)
    assert recorder.disagreement(x[:1].expand(3, -1), layout)["disagreement"] == pytest.approx(0, abs=1e-6)


def test_of_two_lines_of_a_round_the_last_counts(tmp_path):
    recorder = importlib.import_module("benchmarks.evidence.recorder")
    assert recorder.read(tmp_path) == []
    (tmp_path / recorder.FILE).write_text('{"round": 5, "a": 1}\n{"round": 10, "a": 2}\n{"round": 5, "a": 3}\n{"rou')
    assert recorder.read(tmp_path) == [{"round": 5, "a": 3}, {"round": 10, "a": 2}]


def story() -> dict[str, dict]:
    """A study in the middle: rates chosen, a few methods compared at two places, one run diverged."""
    found = {name: cell for name, cell in everything(phases=("core",)).items() if cell["phase"] == "rates"}
    found |= cells_with({"lora": [60, 50, 70], "ffa": [55, 45, 60], "tad5": [62, 52.5, 72.4], "tad15": [61, 51, 71]})
    found |= cells_with({"lora": [70, 72], "decaf": [80, 81]}, 0.1)
    half = grid.Cell("ablations", "trec6", "lora-half", 0.02, 0, 2e-3, 1)
    found[half.name] = result(half, 0.6)
    broken = grid.Cell("main", "trec6", "decaf", 0.02, 0, 2e-3, 1)
    return found | {broken.name: cells.describe(broken) | {"diverged": "peer 3 diverged in round 4"}}


def test_the_page_draws_what_the_cells_say():
    found = story()
    text = page.html(found)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    drawn = {chart["title"]: chart for chart in json.loads(data)}
    forest = {variant["name"]: variant["rows"] for variant in drawn["Paired differences"]["variants"]}
    (tad,) = [row for row in forest["trec6, p = 0.02"] if row["name"] == "tad5"]
    assert tad["points"] == pytest.approx([2, 2.5, 2.4]) and tad["pairs"] == 3
    assert tad["mean"] == pytest.approx(2.3) and tad["lo"] == pytest.approx(1.643, abs=1e-3) and tad["hi"] > tad["mean"]
    (decaf,) = forest["trec6, p = 0.1"]
    assert (decaf["lo"], decaf["points"]) == (None, pytest.approx([10, 9]))
    assert "lora-half" not in {line["name"] for line in drawn["Accuracy over connectivity"]["variants"][0]["series"]}
    over_p = {line["name"]: line for line in drawn["Accuracy over connectivity"]["variants"][0]["series"]}
    assert over_p["lora"]["x"] == [0.02, 0.1] and over_p["lora"]["y"] == pytest.approx([60, 71])
    (over_bytes,) = [v for v in drawn["Accuracy over bytes"]["variants"] if v["name"] == "trec6, p = 0.1"]
    assert {line["name"]: line["x"] for line in over_bytes["series"]} == {"lora": [0, 0.001], "decaf": [0, 0.001]}
    assert "peer 3 diverged in round 4" in text and "dfl train launch/recipes/trec6.yaml" in text
    assert "lora on trec6 at p = 0.1 (2 of 3 seeds), 0.5" in text
    assert "decaf on trec6 at p = 0.02 (1 of 3 seeds), 0.1 (2 of" in text


@pytest.mark.parametrize("trained, share", [("B", 0.25), ("A+head", 4.0), ("A+B", None), ("A+B+M", None)])
def test_the_frozen_factors_gradient_is_relative_to_the_trained_ones(trained, share):
    assert findings.frozen_share({"trained": trained, "gradient_A": 0.1, "gradient_B": 0.4}) == share


def test_topologies_are_compared_over_bytes_and_rates_are_listed():
    found = everything(phases=("core", "claims"))
    for name, cell in found.items():
        for point in cell["curve"]:
            point["message_bytes"] *= 7 if "lora-ring" in name else 1
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html(found), re.S)
    (drawn,) = [chart for chart in json.loads(data) if chart["title"] == "Topologies at equal bytes"]
    ends = {line["name"]: line["x"][-1] for line in drawn["variants"][0]["series"]}
    assert ends == dict.fromkeys(("edge activation, p = 0.1", *grid.GRAPHS), 0.001) | {"ring": 0.007}
    (row,) = [row for row in tables.rate_rows(found) if row[:2] == ["trec6", "ffa"]]
    assert row[2].startswith("0.0005, 0.0005: 50.1 (chosen); 0.001, 0.001: 50.1; 0.002, 0.002: 50.1;")


def test_a_page_of_nothing_says_so():
    assert "all of lora, tad5, ffa, tad15, decaf on trec6" in page.html({}) and tables.gaps(everything()) == ""


def test_tables_are_made_anew_between_their_marks():
    marks = "before\n\n<!-- evidence: {} -->\n\nold\n\n<!-- end of evidence -->\n\nafter\n"
    found = story()
    made = tables.with_tables(marks.format("results") + marks.format("verdicts"), found)
    row = "| 62.3 ± 24.7 (3) | 31.2 ± 12.4 (3) | 62.3 ± 24.7 (3) | +2.3 ± 0.7 (3) | 0.0 |"
    assert f"| trec6 | 0.02 | tad5 | 0.002, 0.002 {row}" in made
    assert "| trec6 | 0.02 | decaf | 0.002, 0.002 | 0.0 (1) | 0.0 (1) | 0.0 (1) | -60.0 (1) | – |" in made
    assert "TAD ahead of LoRA, as FFA reaches 89 % of LoRA | held | tad5 - lora: +2.0, +2.5, +2.4: mean +2.3" in made
    assert "old" not in made and made.count("before") == made.count("after") == 2
    assert tables.with_tables(made, found) == made
    short = tables.with_tables(marks.format("short"), found)
    assert "TAD ahead of LoRA, as FFA reaches 89 % of LoRA: **held** (tad5 - lora: +2.0, +2.5, +2.4: mean +2.3" in short
    assert "; `lora` 60.0 ± " in short and "`tad5` 62.3 ± 24.7 (3)" in short and "decaf" not in short
    assert "Nothing is decided yet." in tables.with_tables(marks.format("short"), {})
    assert "No claim has a pair of runs yet." in tables.with_tables(marks.format("verdicts"), {})


def test_the_documents_tables_are_those_of_the_committed_cells():
    found = committed()
    for folder, count in (("benchmarks", 5), ("", 1)):
        text = (ROOT / folder / "README.md").read_text()
        assert len(tables.MARKS.findall(text)) == text.count("<!-- evidence: ") == count
        assert tables.with_tables(text, found) == text
    for name, cell in found.items():
        missing = {"commands", "seed"} | ({"git_commit", "versions", "hardware"} if "diverged" not in cell else set())
        assert missing <= cell.keys(), name
        assert cell["phase"] == "rates" or cell.get("diverged") or cell["test"], name


def test_the_guide_counts_the_runs_whose_consensus_is_ahead_of_the_best_peer():
    found = committed()
    gains = [gain for place in tables.SPARSE_PLACES for method in tables.MERGED
             for gain in findings.gains_of_merging(found, place, method)]
    guide = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"ahead of the best peer in {sum(gain > 0 for gain in gains)} of {len(gains)} runs" in guide


def test_collecting_keeps_the_order_of_the_protocol_and_lists_what_can_be_run(tmp_path, monkeypatch, capsys):
    found = story()
    for name, cell in found.items():
        runner.keep(tmp_path, name, cell)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "evidence.json")
    assert evidence.main(["collect", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "evidence.json").read_text())
    assert stored["cells"] == found and stored["git_commit"]
    other = tmp_path / "of another machine"
    runner.keep(other, "trec6-lora-p0.02-s0", {"final": {"mean": 0.5}})
    assert evidence.main(["restore", "--out", str(other)]) == 0
    assert runner.stored(other) == found | {"trec6-lora-p0.02-s0": {"final": {"mean": 0.5}}}  # what is there stays
    names = list(stored["cells"])
    places = [names.index(f"trec6-lora-{end}") for end in ("p0.1-s100-lr0.002-B1", "p0.02-s0", "p0.02-s2")]
    assert places == sorted(places)
    assert evidence.main(["list", "--out", str(tmp_path), "--phase", "core"]) == 0
    said = capsys.readouterr().out
    assert "done     trec6-lora-p0.02-s0  60.0" in said and "to do    trec6-decaf-p0.02-s1" in said
    assert "done     trec6-decaf-p0.02-s0  diverged" in said
