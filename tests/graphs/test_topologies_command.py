"""The command: what it prints is what the library says, and errors are one line."""

import json

import pytest

import topologies
from topologies import cli, spectrum
from topologies.draw import draw, save


def run(capsys, *words):
    code = cli.main(list(map(str, words)))
    found = capsys.readouterr()
    return code, found.out, found.err


def test_list_names_everything(capsys):
    _, out, _ = run(capsys, "list", "--json")
    assert json.loads(out) == topologies.describe()
    assert list(topologies.describe()) == topologies.names()


def test_compare_ranks_by_seconds(capsys):
    _, out, _ = run(capsys, "compare", "--peers", 16, "--message", "1MB", "--bandwidth", "8Gbit", "--latency", 0.01, "--json")
    rows = json.loads(out)
    ranked = [row for row in rows if row["sums"] == "doubly" and row["seconds"] is not None]
    assert [row["seconds"] for row in ranked] == sorted(row["seconds"] for row in ranked)
    by_name = {row["name"]: row for row in rows}
    assert by_name["one_peer_exponential"]["rounds"] == 4
    assert by_name["one_peer_exponential"]["seconds"] == pytest.approx(4 * 0.011)
    assert by_name["complete"]["seconds"] == pytest.approx(0.01 + 0.015)
    assert by_name["ring"]["rate"] == pytest.approx(0.949253, abs=1e-6)
    assert rows[-1]["sums"] == "row" and not {"edge_list", "contact_trace"} & set(by_name)


@pytest.mark.long
def test_latency_and_bandwidth_change_the_ranking(capsys):
    def first(*options):
        return json.loads(run(capsys, "compare", "--peers", 16, "--json", *options)[1])[0]["name"]

    assert first("--latency", 1, "--message", 1) == "complete"
    assert first("--latency", 0.0001, "--message", "1GB") != "complete"


def test_table_and_describe(capsys):
    _, out, _ = run(capsys, "compare", "--peers", 6, "--names", "ring", "el_local", "edge_cycle")
    assert out.splitlines()[-1].split()[1] == "el_local" and "the mean moves" in out
    _, out, _ = run(capsys, "describe", "ring", "--peers", 10, "--json")
    facts = json.loads(out)["facts"]
    assert facts["slem"] == pytest.approx(0.872678, abs=1e-6) and facts["b_connectivity"] == 1
    _, out, _ = run(capsys, "describe", "contact_trace")
    assert "path = required" in out and "here:" not in out


@pytest.mark.parametrize("name", ["base_graph", "star", "matcha"])
def test_simulate_measures_what_is_predicted(capsys, name):
    _, out, _ = run(capsys, "simulate", name, "--rounds", 40, "--runs", 5, "--json")
    found = json.loads(out)
    if name == "base_graph":
        assert found["exact_after"] == spectrum.finite_time(topologies.build(name, found["num_peers"])).rounds
    elif name == "star":
        assert found["measured_rate"] == pytest.approx(found["predicted_rate"], abs=1e-3)
    else:
        assert found["measured_rate"] <= found["predicted_rate"] + 0.05
    assert len(found["distance"]) == 41 and found["distance"][0] == 1


def test_accelerated_simulation_keeps_its_promise(capsys):
    _, out, _ = run(capsys, "simulate", "path", "--accelerate", 6, "--rounds", 12, "--json")
    found = json.loads(out)
    assert found["predicted_rate"] - 0.05 < found["measured_rate"] < found["predicted_rate"] + 1e-3  # the bound is tight


@pytest.mark.long
def test_drawings_repeat_to_the_byte(tmp_path):
    for ending in ("png", "svg"):
        files = [save(draw(topologies.build("one_peer_exponential", 6)), tmp_path / f"{k}.{ending}") for k in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


ERRORS = [
    (("describe", "rign"), "known: path, ring"),
    (("compare", "--peers", "10", "--names", "torus"), "try 9 or 12"),
    (("draw", "ring", "--output", "ring.gif"), "end in .png or .svg"),
    (("simulate", "random_matching", "--accelerate", "3"), "static symmetric W"),
    (("gallery", "--names", "rign", "--output", "."), "known: path, ring"),
    (("simulate", "ring", "--set", "rows=3"), "no parameter 'rows'"),
]


@pytest.mark.parametrize("words, message", ERRORS, ids=str)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and not out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_sizes_with_units():
    assert cli.quantity("10Gbit/s") == 1.25e9 and cli.quantity("1.5kB") == 1500 and cli.quantity("7") == 7
    for text in ("-1", "ten", "0", "1MX"):
        with pytest.raises(Exception, match="positive size"):
            cli.quantity(text)
