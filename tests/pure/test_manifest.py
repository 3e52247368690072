"""Manifests: what they have to name, what is not read, versions, and what a run is not continued on."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from made_up_runs import sign, write_checkpoint
from safetensors.torch import load_file, save_file

from dfl.cli import main
from dfl.config import from_dict
from dfl.run import checkpoint
from dfl.run import train as running
from dfl.store import manifest
from dfl.store.records import read_lines

FIRST = Path(__file__).parents[1] / "data" / "checkpoint_v1"


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, 3)


def rewritten(folder, change) -> None:
    """The manifest with another tree in it, signed again: what its own digest cannot tell."""
    path = folder / "manifest.json"
    tree = change(json.loads(path.read_text()))
    if "version" in tree:
        tree["self"] = manifest._digest_of(tree)
    path.write_text(json.dumps(tree))


def test_what_is_written_is_read(folder):
    found = manifest.read(folder)
    assert (found.rounds, found.peers, found.states) == (3, 2, ["state-0.safetensors"]) and manifest.verify(folder) == 3
    assert json.loads((folder / "manifest.json").read_text())["version"] == manifest.VERSION


def without(name):
    return lambda tree: tree | {"sha256": {key: value for key, value in tree["sha256"].items() if key != name}}


DAMAGE = {
    "no digests": (lambda tree: tree | {"sha256": {}}, "does not name peer-0/adapter_model.safetensors"),
    "no digests, first version": (lambda tree: {"rounds": 3, "sha256": {}}, "peers = 0"),
    "no table of digests": (lambda tree: {key: value for key, value in tree.items() if key != "sha256"}, "it lacks 'sha256'"),
    "digests as a list": (lambda tree: tree | {"sha256": ["x"]}, ""),
    "a digest of another form": (lambda tree: tree | {"sha256": tree["sha256"] | {"state-0.safetensors": "abc"}}, "is none"),
    "a digest that is a number": (lambda tree: tree | {"sha256": tree["sha256"] | {"state-0.safetensors": 7}}, "is none"),
    "a peer is missing": (without("peer-1/adapter_model.safetensors"), "does not name peer-1/adapter_model.safetensors"),
    "fewer peers in the middle, first version": (
        lambda tree: {"rounds": 3, "sha256": {"peer-2/adapter_model.safetensors": "0" * 64}}, "does not name peer-0"),
    "no state": (without("state-0.safetensors"), "names no state"),
    "a file outside": (lambda tree: tree | {"sha256": tree["sha256"] | {"../../recipe.yaml": "0" * 64}}, "no file of a checkpoint"),
    "an absolute path": (lambda tree: tree | {"sha256": tree["sha256"] | {"/etc/hostname": "0" * 64}}, "no file of a checkpoint"),
    "another round": (lambda tree: tree | {"rounds": 4}, "it is of round 4"),
    "rounds as text": (lambda tree: tree | {"rounds": "3"}, "rounds = '3'"),
    "a version that is none": (lambda tree: tree | {"version": True}, "version = True"),
    "a list": (lambda tree: [tree], ""),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_manifest_that_does_not_name_everything_is_not_accepted(folder, case):
    change, said = DAMAGE[case]
    rewritten(folder, change)
    with pytest.raises(manifest.UnreadableError, match="round-00003 has no readable manifest: .*" + said):
        manifest.verify(folder)
    assert checkpoint.latest(folder.parent.parent) is None


@pytest.mark.long
def test_every_flipped_bit_of_a_manifest_is_noticed(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 2, 32):
            raw = bytearray(whole)
            raw[at] ^= bit
            path.write_bytes(raw)
            try:
                accepted = manifest.read(folder)
            except manifest.UnreadableError:
                continue
            # white space between two values may be another: nothing is said by it
            assert json.loads(raw) == json.loads(whole), (at, bit, accepted)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    write_checkpoint(tmp_path, 3)
    rewritten(write_checkpoint(tmp_path, 4), lambda tree: tree | {"version": manifest.VERSION + 1, "sha256": None, "more": 1})
    with pytest.raises(manifest.NewerError, match=f"round-00004 has format version {manifest.VERSION + 1}, .* reads up to"):
        checkpoint.latest(tmp_path)


def test_every_version_has_a_way_to_the_next():
    assert list(manifest.UPGRADES) == list(range(1, manifest.VERSION))


# -- whole runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("manifests"))


FIELDS = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": 3, "checkpoint__every": 1, "checkpoint__keep": 3}


def words(root, output, **fields):
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **(FIELDS | fields))]


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "run"
    assert main(words(root, output)) == 0
    return output


def end_of(output):
    folder = checkpoint.latest(output)
    state = {name: value.tolist() for name, value in checkpoint.read_state(folder, range(4)).items()}
    return folder.name, state, [(folder / f"peer-{peer}" / "adapter_model.safetensors").read_bytes() for peer in range(4)]


def halted(done, output, keep=1):
    """The run as it was after its first `keep` checkpoints."""
    shutil.copytree(done, output)
    for folder in checkpoint.complete(output)[keep:]:
        shutil.rmtree(folder)
    return output


def test_files_and_folders_that_no_manifest_names_are_not_read(root, done, tmp_path):
    output = halted(done, tmp_path / "run")
    folder = checkpoint.latest(output)
    stray = {name: torch.full_like(value, 7.0) for name, value in load_file(folder / "state-0.safetensors").items()}
    save_file(stray, folder / "state-7.safetensors")
    (folder / "state-9.safetensors").write_bytes(b"no tensors at all")
    (folder / "peer-11").mkdir()
    for name in ("round-00009", "round-2", "round-00003.old", "mine"):
        shutil.copytree(folder, folder.parent / name)
    assert main([*words(root, output), "--resume"]) == 0
    assert end_of(output) == end_of(done)


def test_a_checkpoint_of_fewer_peers_than_the_run_has_is_refused(root, done, tmp_path, capsys):
    output = halted(done, tmp_path / "run")
    rewritten(checkpoint.latest(output), lambda tree: without("peer-3/adapter_model.safetensors")(tree) | {"peers": 3})
    folder = checkpoint.latest(output)
    kept = {k: v.clone() for k, v in load_file(folder / "state-0.safetensors").items() if k.split(".")[1] != "3"}
    (folder / "state-0.safetensors").unlink()
    save_file(kept, folder / "state-0.safetensors")
    sign(folder)
    assert main([*words(root, output), "--resume"]) == 2
    assert "round-00001 lacks peer 3" in capsys.readouterr().err


def test_a_newer_checkpoint_stops_a_run_with_a_line(root, done, tmp_path, capsys):
    output = halted(done, tmp_path / "run", keep=2)
    rewritten(checkpoint.latest(output), lambda tree: tree | {"version": 99})
    assert main([*words(root, output), "--resume"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "round-00002 has format version 99" in said[0] and "go on with the newer one" in said[0]
    assert main(["eval", str(output)]) == 2
    assert "has format version 99" in capsys.readouterr().err


def test_a_run_of_the_first_format_goes_on(tmp_path, monkeypatch):
    """Its manifest had no version, its recipe fewer fields, and its contents were not saved. From now on they are."""
    shutil.copytree(FIRST, tmp_path / "run")
    tiny_models.save(tmp_path / "bert", "bert", layers=1)
    tiny_runs.write_data(tmp_path)
    monkeypatch.chdir(tmp_path)  # its paths are relative
    folder = checkpoint.latest(Path("run"))
    assert (folder.name, manifest.read(folder).contents) == ("round-00002", {})
    before = load_file(FIRST / "checkpoints" / "round-00002" / "state-0.safetensors")
    assert before and all(torch.equal(value, before[name]) for name, value in checkpoint.read_state(folder, [0, 1]).items())
    first_lines = read_lines(Path("run/metrics.jsonl"))
    assert main(["train", "run/recipe.yaml", "--resume"]) == 0
    newest = checkpoint.latest(Path("run"))
    assert newest.name == "round-00003" and manifest.read(newest).contents["base model"]
    assert json.loads((newest / "manifest.json").read_text())["version"] == manifest.VERSION
    lines = read_lines(Path("run/metrics.jsonl"))
    assert lines[:3] == first_lines and [line["round"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["trains"] == "A"  # the phase goes on: B in two rounds, then A


# -- changed under the same names ------------------------------------------------------------------------------------------------


def own(root, tmp_path):
    """Model and data of the test's own."""
    shutil.copytree(root / "bert", tmp_path / "bert")
    shutil.copy(root / "data.csv", tmp_path / "data.csv")
    return tmp_path


def a_label(place):
    path = place / "data.csv"
    lines = path.read_text().splitlines()
    lines[20] = lines[20].replace(",no", ",yes") if lines[20].endswith("no") else lines[20].replace(",yes", ",no")
    path.write_text("\n".join(lines) + "\n")


def a_text(place):
    path = place / "data.csv"
    lines = path.read_text().splitlines()
    lines[25] = lines[25].replace(" ", " not ", 1)
    path.write_text("\n".join(lines) + "\n")


def a_weight(place):
    weights = {name: value.clone() for name, value in load_file(place / "bert" / "model.safetensors").items()}
    weights["encoder.layer.0.attention.self.key.weight"][7, 3] += 1e-3
    (place / "bert" / "model.safetensors").unlink()
    save_file(weights, place / "bert" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change, said", [(a_label, "(training|evaluation) labels of data.train = '.*data.csv'"),
                                          (a_text, "(training|evaluation) examples of data.train = '.*data.csv'"),
                                          (a_weight, "base model of model.name = '.*bert'")])
def test_what_changed_under_the_same_name_is_refused(root, tmp_path, capsys, monkeypatch, change, said):
    place = own(root, tmp_path)
    tiny_runs.stop_after(running, 2, patch=monkeypatch.setattr)
    assert main(words(place, tmp_path / "run")) == running.STOPPED
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    change(place)
    capsys.readouterr()
    assert main([*words(place, tmp_path / "run"), "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    pytest.raises(ValueError, lambda: (_ for _ in ()).throw(ValueError(lines[0]))).match(
        f"changed since '.*run' was begun: {said} \\('[0-9a-f]{{16}}' now, '[0-9a-f]{{16}}' then\\)")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# -- the recipe it was begun with ---------------------------------------------------------------------------------------------------


def test_a_recipe_from_before_a_field_existed_goes_on(root, done, tmp_path):
    """Whichever field it is, as long as it has its default now."""
    import yaml
    output = halted(done, tmp_path / "run")
    tree, default = yaml.safe_load((output / "recipe.yaml").read_text()), from_dict({}).to_dict()
    left_out = []
    for section, inner in list(tree.items()):
        if isinstance(inner, dict) and "name" not in inner:
            left_out += [f"{section}.{key}" for key in list(inner) if inner[key] == default[section][key]]
            tree[section] = {key: value for key, value in inner.items() if value != default[section][key]}
        elif inner == default[section]:
            left_out.append(section)
            del tree[section]
    assert len(left_out) > 30
    (output / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main([*words(root, output), "--resume"]) == 0
    assert end_of(output) == end_of(done)


def test_a_field_that_is_new_and_not_its_default_is_named(root, done, tmp_path, capsys):
    import yaml
    output = halted(done, tmp_path / "run")
    tree = yaml.safe_load((output / "recipe.yaml").read_text())
    del tree["train"]["momentum"]
    (output / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main([*words(root, output, train__momentum=0.5), "--resume"]) == 2
    assert "train.momentum = 0.5 differs from 0.0, with which" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [("peers: [1, 2", "is not valid YAML"), ("", "is empty"), ("- 1\n- 2\n", "must hold a mapping"),
                                        ("peers: many\n", "peers = 'many' is not allowed"),
                                        ("train: 7\n", "train = 7 is not allowed; allowed: a mapping of fields"),
                                        ("peerz: 4\n", "unknown key 'peerz'"), (b"\xff\xfe\x00peers", "is not valid YAML")])
def test_a_damaged_recipe_is_one_line(root, done, tmp_path, capsys, text, said):
    output = halted(done, tmp_path / "run")
    (output / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([*words(root, output), "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and "recipe.yaml" in lines[0] and lines[0].startswith("dfl: ")
