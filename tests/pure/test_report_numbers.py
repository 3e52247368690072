"""The numbers of a report against numpy and scipy, on made-up records."""

import itertools

import numpy as np
import pytest
from made_up_runs import record, write_run, write_sweep

from dfl.report import several
from dfl.report.build import write_report
from dfl.report.groups import choose_baseline, curve, differences, distinct, grouped, outcome, place
from dfl.report.runs import counted, spent
from dfl.report.single import crossing, default_targets, sections
from dfl.report.statistics import estimate, paired
from dfl.store.runs import read_all, read_run

stats = pytest.importorskip("scipy.stats")
RULES = ("lora", {"name": "tad", "T": 1}, {"name": "tad", "T": 5}, "local")
PROBABILITIES, SEEDS = (0.1, 0.5), (0, 1, 2, 3)


def label(rule) -> str:
    return rule if isinstance(rule, str) else f"tad T={rule['T']}"


@pytest.fixture(scope="module")
def table():
    """value[rule, p, seed] of two peers after the last round."""
    rng = np.random.default_rng(3)
    return {(label(rule), p, seed): rng.uniform(0.2, 0.9, 2) for rule, p, seed in itertools.product(RULES, PROBABILITIES, SEEDS)}


@pytest.fixture(scope="module")
def folders(table, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    made = {}
    for rule, p, seed in itertools.product(RULES, PROBABILITIES, SEEDS):
        values = table[label(rule), p, seed].tolist()
        records = [record(0, [0.1, 0.1], consensus=0.1), record(2, [v / 2 for v in values]), record(4, values, consensus=values[0])]
        made[label(rule), p, seed] = write_run(root / f"{label(rule)}-{p}-{seed}".replace(" ", "-"), records, method=rule, seed=seed,
                                               topology={"name": "edge_activation", "base": "complete", "p": p})
    return made


@pytest.fixture(scope="module")
def members(folders):
    runs, _ = read_all(list(folders.values()))
    return place(runs)[0]


@pytest.mark.parametrize("values", [[0.1, 0.4, 0.4], [0.5, 0.5, 0.5 + 1e-6], [1.0, 2.5, -3.0, 7.0, 0.25]])
def test_an_interval_is_scipys(values):
    found = estimate([*values, None])
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.num == len(values) and found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.1, 0.9]])
def test_fewer_than_three_values_have_no_interval(values):
    found = estimate(values)
    assert found.half is None and found.mean == pytest.approx(0.5) and found.text() == f"0.5000 (n = {len(values)}: no interval)"
    assert paired(dict(enumerate(values)), dict.fromkeys(range(9), 0.25)).half is None


def test_equal_values_have_no_interval_of_zero_width():
    assert estimate([0.1] * 4).text() == "0.1000 (n = 4, all equal: no interval)"
    # equal but for the rounding of the differences
    assert len({0.3 - 0.2, 0.4 - 0.3, 0.9 - 0.8}) > 1
    found = paired({0: 0.3, 1: 0.4, 2: 0.9}, {0: 0.2, 1: 0.3, 2: 0.8})
    assert found.half is None and found.missing == "n = 3, all equal: no interval"
    assert paired({0: 0.1 + 0.2, 1: 0.3, 2: 0.3}, dict.fromkeys(range(3), 0.3)).half is None


def test_no_value_has_no_mean():
    assert estimate([None]) is None and estimate([]) is None and paired({0: None}, {0: 0.5}) is None


def test_pairs_are_those_that_both_have():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0, 3: None, 4: 9.0}, {0: 0.5, 1: 0.0, 2: 1.0, 3: 1.0}
    found, test = paired(a, b), stats.ttest_rel([1.0, 2.0, 4.0], [0.5, 0.0, 1.0]).confidence_interval(0.95)
    assert found.num == 3 and (found.mean - found.half, found.mean + found.half) == pytest.approx((test.low, test.high))


def test_groups_hold_the_seeds_and_their_means(members, table):
    groups = grouped(members)
    assert len(groups) == len(RULES) * len(PROBABILITIES)
    for (rule, topology, setting), group in groups.items():
        p = float(topology.rpartition("=")[2])
        found = estimate([outcome(m.run, "accuracy", True)["mean"] for m in group])
        wanted = [table[rule, p, seed].mean() for seed in SEEDS]
        assert setting == "" and found.num == 4 and found.mean == pytest.approx(np.mean(wanted))
        assert found.half == pytest.approx(stats.t.ppf(0.975, 3) * stats.sem(wanted))
        worst = [outcome(m.run, "accuracy", True)["worst"] for m in group]
        assert worst == pytest.approx([table[rule, p, seed].min() for seed in SEEDS])


def test_differences_are_paired_by_topology_and_seed(members, table):
    # one run less: its pair is left out, and its seed from the row over all places
    short = [m for m in members if not (m.method == "tad T=5" and m.fields["topology.p"] == 0.5 and m.replicate[0] == "2")]
    values = {id(m): outcome(m.run, "accuracy", True)["mean"] for m in short}
    found = {(rule, where): result for rule, where, result in differences(short, values, "lora")}
    assert len(found) == 9  # three rules, two places and both
    for rule in ("tad T=1", "tad T=5", "local"):
        for p in PROBABILITIES:
            seeds = [s for s in SEEDS if (rule, p, s) != ("tad T=5", 0.5, 2)]
            own, base = ([table[name, p, s].mean() for s in seeds] for name in (rule, "lora"))
            result, test = found[rule, f"edge_activation p={p}"], stats.ttest_rel(own, base).confidence_interval(0.95)
            assert result.num == len(seeds) and result.mean == pytest.approx(np.mean(own) - np.mean(base))
            assert (result.mean - result.half, result.mean + result.half) == pytest.approx((test.low, test.high))
        seeds = [s for s in SEEDS if rule != "tad T=5" or s != 2]
        each = [np.mean([table[rule, p, s].mean() - table["lora", p, s].mean() for p in PROBABILITIES]) for s in seeds]
        overall = found[rule, "all (2 places)"]
        assert overall.num == len(seeds) and overall.mean == pytest.approx(np.mean(each))
        assert overall.half == pytest.approx(stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(each))


def test_a_cell_of_the_map_is_the_mean_over_seeds(members, table):
    results = {id(m): outcome(m.run, "accuracy", True) for m in members}
    (grid,) = several.grids(members, results, "mean", "accuracy")
    assert (grid["row"], grid["column"], grid["rows"], grid["columns"]) == ("method.T", "topology.p", ["1", "5"], ["0.1", "0.5"])
    wanted = [[np.mean([table[f"tad T={T}", p, s] for s in SEEDS]) for p in PROBABILITIES] for T in (1, 5)]
    np.testing.assert_allclose(np.array(grid["values"]), wanted, rtol=1e-5)
    assert grid["counts"] == [[4, 4], [4, 4]]


def test_a_curves_band_is_over_seeds(members, table):
    group = grouped(members)["lora", "edge_activation p=0.1", ""]
    points = curve(group, lambda run: {r["round"]: r["eval"]["accuracy"]["mean"] for r in run.records})
    last = [table["lora", 0.1, s].mean() for s in SEEDS]
    assert [t for t, *_ in points] == [0, 2, 4] and points[0][1:] == pytest.approx((0.1,) * 3)
    assert points[-1][1:] == pytest.approx((np.mean(last), min(last), max(last)))
    assert points[1][1] == pytest.approx(np.mean(last) / 2)


def test_a_learning_rate_chosen_for_each_rule_is_no_setting(tmp_path):
    runs = [read_run(write_run(tmp_path / f"{rule}{seed}", [record(1, [0.5, 0.5])], method=rule, seed=seed, train={"lr": lr}))
            for rule, lr in (("lora", 0.01), ("ffa", 0.02)) for seed in (0, 1)]
    members, notes = place(runs)
    assert {m.setting for m in members} == {""} and notes == ["train.lr goes with the method: lora 0.01, ffa 0.02."]
    assert len(differences(members, {id(m): 0.5 for m in members}, "lora")) == 1
    runs.append(read_run(write_run(tmp_path / "more", [record(1, [0.5, 0.5])], method="ffa", train={"lr": 0.01})))
    members, notes = place(runs)
    assert {m.setting for m in members} == {"train.lr=0.01", "train.lr=0.02"} and notes == []


def test_local_training_beside_rules_with_values_of_their_own_keeps_them_apart(tmp_path):
    runs = []
    for rule, lr in (("lora", 0.01), ("ffa", 0.02)):
        folder = write_run(tmp_path / rule, [record(1, [0.5, 0.5])], method=rule, train={"lr": lr}, baseline="local")
        write_run(folder / "baseline-local", [record(1, [0.2, 0.2])], method="local", train={"lr": lr})
        runs += [run := read_run(folder), run.baseline]
    members, notes = place(runs)
    assert notes == ["train.lr goes with the method: lora 0.01, ffa 0.02."] and {m.setting for m in members} == {""}
    assert [m.method for m in members] == ["lora", "local train.lr=0.01", "ffa", "local train.lr=0.02"]
    assert len(differences(members, {id(m): 0.5 for m in members}, "lora")) == 3


def test_the_same_run_twice_is_no_second_seed(tmp_path):
    long, short = ([record(t, [0.5, 0.5]) for t in range(n)] for n in (5, 3))
    runs = [read_run(write_run(tmp_path / name, records, rounds=4)) for name, records in (("a", short), ("b", long))]
    kept, notes = distinct(place(runs)[0])
    assert [m.run.name for m in kept] == ["b"] and notes == ["a and b differ in no field that counts: only the longer one is used."]
    assert len(read_all([tmp_path / "a", tmp_path / "a" / ".." / "a"])[0]) == 1


def test_the_baseline_is_a_rule_of_the_runs():
    rules = ["decaf", "tad T=1", "tad T=5", "local"]
    assert choose_baseline(rules, None) == "local" and choose_baseline(["b", "a"], None) == "b"
    assert choose_baseline(rules, "tad T=5") == "tad T=5" and choose_baseline(rules, "decaf") == "decaf"
    with pytest.raises(ValueError, match="baseline = 'tad' is several methods of these runs; allowed: decaf, tad T=1, tad T=5, local"):
        choose_baseline(rules, "tad")
    with pytest.raises(ValueError, match="baseline = 'ffa' is no method"):
        choose_baseline(rules, "ffa")


def test_cost_is_summed_from_the_beginning_and_the_first_crossing_counts(tmp_path):
    values = {0: 0.1, 2: 0.4, 4: 0.7, 6: 0.5, 8: 0.9}
    run = read_run(write_run(tmp_path / "run", [record(t, [values[t]] * 2 if t in values else None) for t in range(9)]))
    assert spent(run)[0] == (0, 0) and spent(run)[8] == (8000, 16.0)  # without measuring and evaluating
    assert crossing(run, "accuracy", True, 0.7) == (4, 4000, 8.0) and crossing(run, "accuracy", True, 0.45) == (4, 4000, 8.0)
    assert crossing(run, "accuracy", True, 0.95) is None
    assert default_targets([run], "accuracy", True) == [0.5, 0.82]
    falling = [record(t, [v, v], metric="perplexity") for t, v in enumerate((30.0, 20.0, 10.0))]
    run = read_run(write_run(tmp_path / "lm", falling, facts={"primary": "perplexity", "better": {"perplexity": "lower"}}))
    assert crossing(run, "perplexity", False, 20.0) == (1, 1000, 2.0)
    assert default_targets([run], "perplexity", False) == [20.0, 12.0]
    assert outcome(run, "perplexity", False)["worst"] == 10.0


def rows(markdown: str, title: str) -> list[list[str]]:
    """The cells of the table with this title."""
    text = markdown.split(f"{title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if not line.startswith("| ---")]


def test_the_tables_say_it(folders, table, tmp_path):
    write_report(list(folders.values()), tmp_path / "page.html", baseline="local", targets=[0.3])
    text = (tmp_path / "page.md").read_text()
    head, *found = rows(text, "Accuracy after the last round, mean over peers: method by topology")
    assert head == ["method", "edge_activation p=0.1", "edge_activation p=0.5"] and len(found) == 4
    for name, *cells in found:
        for p, cell in zip(PROBABILITIES, cells, strict=True):
            values = [table[name, p, s].mean() for s in SEEDS]
            assert cell == f"{np.mean(values):.4f} ± {stats.t.ppf(0.975, 3) * stats.sem(values):.4f} (4)"
    _, *pairs = rows(text, "Accuracy minus that of local, on the same topology, setting and seed")
    assert len(pairs) == 9 and {row[0] for row in pairs} == {"lora", "tad T=1", "tad T=5"}
    _, *reached = rows(text, "First evaluation at which the mean over peers is at least the target")
    lora = next(row for row in reached if row[:2] == ["lora", "edge_activation p=0.1"])
    rounds = [2 if table["lora", 0.1, s].mean() / 2 >= 0.3 else 4 for s in SEEDS if table["lora", 0.1, s].mean() >= 0.3]
    assert lora[3:5] == [f"{len(rounds)} of 4", f"{np.mean(rounds):.1f}"]


def test_a_sweep_says_what_is_missing(folders, tmp_path):
    names = {}
    for (rule, p, seed), folder in folders.items():
        if p == 0.5 and seed < 2:
            names[folder.name] = {"method": rule, "seed": seed}
            (tmp_path / "s").mkdir(exist_ok=True)
            (tmp_path / "s" / folder.name).symlink_to(folder)
    write_run(tmp_path / "s" / "half", [record(1, [0.1, 0.1])], rounds=9, seed=7, topology={"name": "edge_activation", "p": 0.5})
    sweep = write_sweep(tmp_path / "s", names | {"half": {"seed": 7}, "never": {"seed": 8}, "bad": {"seed": 9}})
    (sweep / "logs").mkdir()
    (sweep / "logs" / "bad.failed.json").write_text('{"error": "peer 0 diverged"}')
    (page, tables) = write_report([sweep])
    text = tables.read_text()
    assert page == sweep / "report.html" and "half: unfinished, 1 of 9 rounds" in text
    assert "- never: has not begun" in text and "- bad: failed: peer 0 diverged" in text
    found = rows(text, "Accuracy after the last round, mean over peers: method by topology")
    assert len(found) == 5 and all(row[1].endswith("(n = 2: no interval)") and "±" not in row[1] for row in found[1:])
    _, *pairs = rows(text, "Accuracy minus that of lora, on the same topology, setting and seed")
    assert len(pairs) == 3 and all(row[3:] == ["n = 2: no interval", "2"] for row in pairs)


def test_accuracy_is_drawn_over_what_the_ledger_counts(tmp_path):
    """Messages add up, a clock goes on; without one there is no curve over it."""
    def with_ledger(t: int, clock: float) -> dict:
        return record(t, [0.1 * t] * 2, ledger={"messages": 3, "seconds": clock * t} if t else {})

    run = read_run(write_run(tmp_path / "timed", [with_ledger(t, 0.5) for t in range(5)]))
    assert counted(run) == {t: (3 * t, 0.5 * t) for t in range(5)}
    titles = {chart["title"]: chart for section in sections(run, "accuracy", True, [0.3]) for chart in section.charts}
    over_time, over_messages = (titles[f"Accuracy by {unit}"]["variants"][0]["series"][0]
                                for unit in ("simulated seconds", "messages"))
    assert over_time["x"] == [0.5 * t for t in range(5)] and over_time["y"] == over_messages["y"] == [0, 0.1, 0.2, 0.3, 0.4]
    assert over_messages["x"] == [3 * t for t in range(5)]
    plain = read_run(write_run(tmp_path / "plain", [with_ledger(t, 0.0) for t in range(5)]))
    titles = {chart["title"] for section in sections(plain, "accuracy", True, [0.3]) for chart in section.charts}
    assert "Accuracy by messages" in titles and "Accuracy by simulated seconds" not in titles
