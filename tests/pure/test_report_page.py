"""The page of a report: whatever state a run is in, a page that says so; nothing from outside; text is never markup."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny_models
import tiny_runs
from made_up_runs import evaluation, record, write_run, write_sweep

from dfl.cli import main
from dfl.config import from_dict
from dfl.config.topology import build_topology
from dfl.report import charts
from dfl.report.build import write_report
from dfl.report.runs import choose_metric, primary_of, scalars
from dfl.store.records import read_lines
from dfl.store.runs import read_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """The text of a page, and whether its elements are closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.wrong = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def report(*folders, **options) -> tuple[str, list[dict], str]:
    """(the page's text, its charts, the Markdown)."""
    output, tables = write_report(list(folders), **options)
    page = output.read_text()
    reader = Reader(page)
    assert not reader.open and not reader.wrong
    assert not re.search(r"(src|href)=\"?https?:|@import|url\((?!data:)", page)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(data, parse_constant=refuse)
    assert page.count("data-chart=") == len(found)
    assert all(chart["title"] and chart["text"] for chart in found)
    return " ".join(" ".join(reader.text).split()), found, tables.read_text()


def chart(found: list[dict], title: str) -> dict:
    (one,) = [c for c in found if c["title"] == title]
    return one


FINISHED = [record(0, [0.1, 0.1], consensus=0.1), record(1), record(2, [0.4, 0.6], consensus=0.55), record(3),
            record(4, [0.7, 0.9], consensus=0.95)]


def test_a_finished_run_is_all_there(tmp_path):
    facts = {"primary": "accuracy", "better": {"accuracy": "higher"}, "label_names": ["no", "yes"], "base": "tiny",
             "shards": {"examples": [30, 10], "classes": [[25, 5], [0, 10]]}, "method": {"T": 5, "reason": "chosen"}}
    run = write_run(tmp_path / "run", FINISHED, facts=facts)
    write_run(run / "baseline-local", [record(0, [0.1, 0.1]), record(4, [0.3, 0.2])], method="local")
    text, found, markdown = report(run, targets=[0.5])
    lines = {line["name"]: line for line in chart(found, "Accuracy by round")["variants"][0]["series"]}
    mean = lines["mean of peers, least to most"]
    assert (mean["x"], mean["y"], mean["lo"], mean["hi"]) == ([0, 2, 4], [0.1, 0.5, 0.8], [0.1, 0.4, 0.7], [0.1, 0.6, 0.9])
    assert lines["consensus model"]["y"] == [0.1, 0.55, 0.95] and lines["training alone, mean of peers"]["y"] == [0.1, 0.25]
    assert lines["peer 1"]["y"] == [0.1, 0.6, 0.9]
    by_bytes = chart(found, "Accuracy by MB of messages")["variants"][0]["series"][0]
    assert by_bytes["x"] == [0, 0.002, 0.004]
    assert chart(found, "Cross term relative")["variants"][0]["series"][0]["y"] == [0.5, 0.25, 0.166667, 0.125]
    phases = {part["name"]: part["y"] for part in chart(found, "Seconds of a round by phase")["variants"][0]["series"]}
    assert phases["local"] == [1.5] * 4 and set(phases) == {"local", "encode", "exchange", "mix", "measure", "evaluate"}
    assert chart(found, "Examples of each class at each peer")["variants"][0]["values"] == [[25, 5], [0, 10]]
    assert "| run | 0.5 | 2 | 2.0 kB | 4.0 |" in markdown and "| run, local | 0.5 | not reached | – | – |" in markdown
    assert "| 1 | 10 | 0.1000 | 0.9000 | 0.2000 |" in markdown and "| mean |  | 0.1000 | 0.8000 | 0.2500 |" in markdown
    for said in ("the mean over 2 peers went from 0.1000 to 0.8000 (peers 0.7000 to 0.9000)", "alone, to 0.2500", "c0ffee",
                 "method: reason chosen", "Higher is better"):
        assert said in text, said


def test_local_training_that_was_stopped_is_marked_where_it_stands_beside_the_run(tmp_path):
    run = write_run(tmp_path / "run", FINISHED)
    write_run(run / "baseline-local", FINISHED[:3], method="local", rounds=4)
    text, _, markdown = report(run)
    assert "| peer | before | after round 4 | training alone, round 2 of 4 |" in markdown
    assert "training alone, round 2 of 4 0.5000" in text and "; training alone, round 2 of 4, to 0.5000" in text
    assert "Its local training alone is not finished: unfinished, 2 of 4 rounds." in text


def test_the_graph_is_that_of_the_recipe(tmp_path):
    topology = {"name": "edge_activation", "base": "complete", "p": 0.3}
    run = write_run(tmp_path / "run", [record(t) for t in range(1, 7)], peers=7, topology=topology, seed=5)
    _, found, _ = report(run)
    graph = chart(found, "Who receives from whom, round by round")
    built = build_topology(from_dict(read_run(run).config))
    for t, frame in zip(graph["rounds"], graph["frames"], strict=True):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(frame), np.uint8))[:49].reshape(7, 7)
        received = built.matrix(t - 1) != 0
        np.fill_diagonal(received, False)
        assert (bits == received).all()
    assert graph["rounds"] == [1, 2, 3, 4, 5, 6] and len(set(graph["frames"])) > 1
    mean = np.mean([built.matrix(t) for t in range(6)], axis=0)
    np.testing.assert_allclose(np.array(chart(found, "Weight given to each peer")["variants"][0]["values"]), mean, rtol=1e-5)


def test_a_graph_that_cannot_be_rebuilt_is_no_reason_for_no_page(tmp_path):
    run = write_run(tmp_path / "run", FINISHED)
    recipe = (run / "recipe.yaml").read_text().replace("name: ring", "name: rung")
    (run / "recipe.yaml").write_text(recipe)
    text, found, _ = report(run)
    assert "The graph could not be rebuilt from the recipe: " in text and "'rung'" in text and len(found) > 4


def test_scalars_and_layers_that_somebody_else_adds_are_shown(tmp_path):
    more = [record(t, truncation_error=t / 2, drift={"mean": 3.0 * t, "min": 0, "max": 9}, note="text",
                   layers={"cross_term": {"query": t, "value": None}}) for t in (1, 2)]
    _, found, _ = report(write_run(tmp_path / "run", more))
    assert chart(found, "Truncation error")["variants"][0]["series"][0]["y"] == [0.5, 1]
    assert chart(found, "Drift")["variants"][0]["series"][0]["y"] == [3, 6]
    layers = chart(found, "By layer")["variants"][0]
    assert (layers["rows"], layers["columns"], layers["values"]) == (["query", "value"], ["1", "2"], [[1, 2], [None, None]])
    assert "note" not in scalars(more[0]) and "lr" not in scalars(more[0])


def torn(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"round": 5, "ev')


def damaged(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'\n{"', b'\n}"', 1))


def unreadable(run):
    (run / "run.json").write_text("{")
    (run / "recipe.yaml").write_text(": [")


BROKEN = {
    "no line yet": ([], None, ["no round recorded", "No evaluation has been recorded yet", "there is no graph to show"]),
    "no file yet": ([], lambda run: (run / "metrics.jsonl").unlink(), ["metrics.jsonl is not there"]),
    "before the first round": (FINISHED[:1], None, ["unfinished, 0 of 9 rounds", "No round has been recorded"]),
    "one round": ([record(1, [0.5, 0.25])], None, ["unfinished, 1 of 9 rounds", "0.3750"]),
    "unfinished": (FINISHED, None, ["This run is not finished: unfinished, 4 of 9 rounds."]),
    "torn": (FINISHED, torn, ["the last line of metrics.jsonl is torn, as by a kill, and is left out"]),
    "a damaged line": (FINISHED, damaged, ["line 2 of metrics.jsonl cannot be read (damaged) and is left out", "round 4"]),
    "nothing but lines": (FINISHED, unreadable, ["run.json is missing or damaged", "recipe.yaml is missing or damaged", "0.8000"]),
    "not finite": ([record(1, [None, 0.5], train_loss={"mean": None, "min": 1.0, "max": None}, train_loss_peers=[None, 1.0],
                           measures={"cross_term": None})], None, ["–", "0.5000", "The mean accuracy over peers was never finite"]),
    "one peer": ([record(1, [0.5])], None, ["the mean over 1 peers"]),
    "no seconds": ([{"round": 1, "eval": evaluation([0.5, 0.5])}], None, ["No seconds have been recorded", "No measures were"]),
    "no number at all": ([{"round": 1}, {"round": 2, "eval": None, "measures": None, "seconds": None}], None, ["No evaluation"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_state_a_run_is_in_there_is_a_page_that_says_so(name, tmp_path):
    records, breaks, said = BROKEN[name]
    run = write_run(tmp_path / "run", records, rounds=9, peers=1 if name == "one peer" else 2)
    if breaks:
        breaks(run)
    text, _, _ = report(run)
    for words in said:
        assert words in text, text[:2000]
    # and among others
    other = write_run(tmp_path / "other", FINISHED, seed=3)
    text, _, markdown = report(run, other, output=tmp_path / "both.html")
    assert "| lora | 0.8000 (n = 1: no interval) |" in markdown and "other" in text


def test_runs_none_of_which_has_ended(tmp_path):
    text, _, _ = report(*(write_run(tmp_path / name, [record(1)], rounds=9, seed=k) for k, name in enumerate("ab")),
                        output=tmp_path / "page.html")
    assert "No run has finished with an evaluation yet" in text


def test_differences_are_drawn_with_their_intervals_where_they_have_one(tmp_path):
    """Three seeds of two rules, against a third; of local there is one pair, which has no interval."""
    found = {"lora": [0.5, 0.4, 0.6], "tad": [0.6, 0.52, 0.68], "local": [0.3]}
    runs = [write_run(tmp_path / f"{rule}-{k}", [record(1, [value, value])], method=rule, seed=k)
            for rule, values in found.items() for k, value in enumerate(values)]
    _, drawn, _ = report(*runs, output=tmp_path / "page.html")
    (variant,) = chart(drawn, "Accuracy minus that of lora")["variants"]
    rows = {row["name"]: row for row in variant["rows"]}
    assert rows["tad"]["mean"] == pytest.approx(0.1) and rows["tad"]["pairs"] == 3
    half = 4.302653 * 0.02 / 3**0.5  # the page has six significant digits
    assert (rows["tad"]["lo"], rows["tad"]["hi"]) == (pytest.approx(0.1 - half, abs=1e-6), pytest.approx(0.1 + half, abs=1e-6))
    assert (rows["local"]["mean"], rows["local"]["lo"], rows["local"]["pairs"]) == (pytest.approx(-0.2), None, 1)


def test_a_diverged_seed_counts_in_no_mean_and_that_is_said(tmp_path):
    runs = [write_run(tmp_path / f"s{k}", [record(1, values)], seed=k) for k, values in enumerate([[0.2, 0.4], [None, 0.9]])]
    text, _, markdown = report(*runs, output=tmp_path / "page.html")
    assert "s1: its last accuracy is not finite; it counts in no mean." in text
    assert "| lora | 0.3000 (n = 1: no interval) |" in markdown


def test_names_are_text_and_not_markup(tmp_path):
    facts = {"primary": "accuracy", "better": {"accuracy": "higher"}, "label_names": ["</script><b>&", "{{DATA}}"],
             "shards": {"examples": [1, 1], "classes": [[1, 0], [0, 1]]}, "base": "<img src=x onerror=alert(1)> | pipe"}
    run = write_run(tmp_path / "a<i>&\"b", FINISHED, facts=facts)
    page = write_report([run])[0].read_text()
    assert "<img src=x" not in page and page.count("</script>") == 2 and "<i>" not in page
    text, found, markdown = report(run)
    assert chart(found, "Examples of each class at each peer")["variants"][0]["columns"] == ["</script><b>&", "{{DATA}}"]
    assert "<img src=x onerror=alert(1)> | pipe" in text and r"&lt;img src=x onerror=alert(1)&gt; \| pipe" in markdown
    assert "# Run a&lt;i&gt;&amp;\"b\n" in markdown and "| labels | &lt;/script&gt;&lt;b&gt;&amp;, \\{\\{DATA\\}\\} |" in markdown


def test_the_primary_metric_is_what_the_run_says(tmp_path):
    assert primary_of({"primary": "f1", "better": {"f1": "higher"}}, {"accuracy": {}}) == ("f1", True)
    assert primary_of({"primary": "f1", "better": {"f1": "lower"}}, {}) == ("f1", False)
    # where it does not say, nobody guesses from a name
    assert primary_of({}, {"peers": {"perplexity": [1.0], "loss": [1.0]}}) == ("perplexity", True)
    lm = read_run(write_run(tmp_path / "lm", [record(1, [9.0, 8.0], metric="perplexity")],
                            facts={"primary": "perplexity", "better": {"perplexity": "lower", "loss": "lower"}}))
    silent = read_run(write_run(tmp_path / "silent", [record(1, [9.0, 8.0], metric="perplexity")], facts={}))
    assert choose_metric([lm], None) == choose_metric([silent, lm], None) == choose_metric([lm, silent], None) == ("perplexity", False)
    assert choose_metric([silent], None) == ("perplexity", True)
    other = read_run(write_run(tmp_path / "o", [record(1, [9.0, 8.0], metric="perplexity")],
                               facts={"better": {"perplexity": "higher"}}))
    with pytest.raises(ValueError, match="metric = 'perplexity': in some of the runs more of it is better, in others less"):
        choose_metric([lm, other], None)
    classes = read_run(write_run(tmp_path / "c", FINISHED))
    with pytest.raises(ValueError, match=r"several primary metrics \(accuracy, perplexity\)"):
        choose_metric([lm, classes], None)
    with pytest.raises(ValueError, match="metric = 'f1' was not evaluated; allowed: accuracy"):
        choose_metric([classes], "f1")


def test_a_page_of_ten_peers_and_a_hundred_rounds_is_small(tmp_path):
    rng = np.random.default_rng(0)
    rows = [record(t, rng.uniform(size=10).tolist(), 0.5, train_loss_peers=rng.uniform(size=10).tolist()) for t in range(101)]
    run = write_run(tmp_path / "run", rows, peers=10, topology={"name": "edge_activation", "base": "complete", "p": 0.3})
    assert write_report([run])[0].stat().st_size < 500_000


def test_of_very_many_peers_the_middle_half_is_drawn(tmp_path):
    values = [k / 1000 for k in range(1000)]
    run = write_run(tmp_path / "run", [record(t, values, train_loss_peers=values) for t in (1, 2)], peers=1000)
    _, found, markdown = report(run)
    lines = {line["name"]: line for line in chart(found, "Accuracy by round")["variants"][0]["series"]}
    middle = lines["median, middle half of the peers"]
    assert len(lines) == 2 and (middle["lo"][0], middle["y"][0], middle["hi"][0]) == (0.25, 0.5, 0.75)
    assert not [c for c in found if c["kind"] == "graph"] and chart(found, "Connectivity") and "| 999 | 0.9990 |" in markdown
    assert (run / "report.html").stat().st_size < 500_000


def test_long_lines_are_thinned_to_their_ends():
    line = charts.series("x", [(t, t / 3) for t in range(5000)])
    assert len(line["x"]) == charts.MAX_POINTS and (line["x"][0], line["x"][-1]) == (0, 4999)
    assert charts.clean(float("nan")) is None and charts.clean(1 / 3) == 0.333333 and charts.clean(True) is True


REFUSED = {
    "no run": (["{empty}"], "empty' holds no run (no recipe.yaml in it) and no sweep (no sweep.json in it)"),
    "nothing": (["{empty}/not"], "not' holds no run"),
    "bad sweep": (["{bad}"], "sweep.json' is not the manifest of a sweep"),
    "metric": (["{run}", "--metric", "f1"], "metric = 'f1' was not evaluated; allowed: accuracy"),
    "baseline": (["{run}", "{other}", "--baseline", "tad"], "baseline = 'tad' is no method of these runs; allowed: lora"),
    "baseline of one": (["{run}", "--baseline", "lora"], "needs several runs to compare; got one"),
    "target": (["{run}", "--target", "nan"], "target = nan is no number to reach"),
    "folder as page": (["{run}", "--output", "{empty}"], "must be two files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reported_is_refused_in_one_line(name, tmp_path, capsys):
    places = {key: tmp_path / key for key in ("empty", "bad", "run", "other")}
    for key in ("empty", "bad"):
        places[key].mkdir()
    (places["bad"] / "sweep.json").write_text("[")
    write_run(places["run"], FINISHED)
    write_run(places["other"], FINISHED, seed=4)
    words, said = REFUSED[name]
    assert main(["report", *(word.format(**places) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dfl: ") and err.count("\n") == 1 and said in err
    assert not list(tmp_path.rglob("report.html"))


def test_an_empty_sweep_has_a_page(tmp_path):
    text, _, _ = report(write_sweep(tmp_path / "sweep", {"a": {"seed": 0}, "b": {"seed": 1}}))
    assert "a: has not begun" in text and "No run has finished with an evaluation yet" in text


def test_a_real_run_through_the_command_line(tmp_path, capsys):
    """What a run records is what the page needs: who holds which classes, the primary metric, the rule's own scalars."""
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=1), tiny_runs.write_data(tmp_path)
    run = tmp_path / "run"
    assert main(["train", *tiny_runs.arguments(model, data, run, method="decaf", baseline="local")]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "out" / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(tmp_path / "out" / "page.html"), str(tmp_path / "out" / "page.md")]
    facts = json.loads((run / "run.json").read_text())["facts"]
    assert (facts["primary"], facts["better"]) == ("accuracy", {"accuracy": "higher", "loss": "lower"})
    shards = facts["shards"]
    assert [sum(row) for row in shards["classes"]] == shards["examples"] and sum(shards["examples"]) == facts["num_train"]
    _, found, markdown = report(run)
    last = read_lines(run / "metrics.jsonl")[-1]
    assert chart(found, "Truncation error")["variants"][0]["series"][0]["y"][-1] == charts.clean(last["truncation_error"])
    for peer, value in enumerate(last["eval"]["peers"]["accuracy"]):
        assert re.search(rf"^\| {peer} \| \d+ \| 0\.\d+ \| {value:.4f} \| 0\.\d+ \| [01]\.\d+ \|$", markdown, re.M)


def test_a_run_that_a_callback_ended_is_finished(tmp_path):
    """It has fewer rounds than it was started for, and says that it is done."""
    from dfl.store.directory import ENDED
    from dfl.store.runs import RunData
    config, records = {"train": {"rounds": 9}}, [{"round": 0}, {"round": 2}]
    assert not RunData(tmp_path, "run", config, {}, records).finished
    (tmp_path / ENDED).write_text("{}")
    assert RunData(tmp_path, "run", config, {}, records).finished
