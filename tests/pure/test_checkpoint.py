"""What is saved is what was evaluated, damage is noticed, and a run that was stopped goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from measured import measured
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dfl.adapters import saving
from dfl.adapters.layout import a_view, b_view, head_view
from dfl.engine import state as trees
from dfl.run import checkpoint, evaluation
from dfl.run import train as running
from dfl.run.saving import placed
from dfl.slots import bits_of
from dfl.store import manifest
from dfl.store.records import read_lines
from dfl.transport import InProcess

pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey", "ignore:.*is_gradient_checkpointing")
CLASSIFY, GENERATE, IMAGES = "sequence_classification", "causal_lm", "image_classification"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_runs.write_data(folder)
    return folder


def make_config(root, output, kind="bert", data="data.csv", **fields):
    folder = root / kind
    if not folder.exists():
        tiny_models.save(folder, kind, layers=2)
    fields = {"lora__targets": "all-linear", "train__lr": 0.03, "checkpoint__keep": 3} | fields
    return tiny_runs.make_config(folder, root / data, output, **fields)


def stock(root, kind, task, folder, **changes):
    """What somebody without this project does: the base model from its folder, the adapter with PEFT."""
    auto = {CLASSIFY: "AutoModelForSequenceClassification", GENERATE: "AutoModelForCausalLM",
            IMAGES: "AutoModelForImageClassification"}[task]
    config = transformers.AutoConfig.from_pretrained(root / kind, **changes)
    if task == CLASSIFY:
        config.pad_token_id = transformers.AutoTokenizer.from_pretrained(root / kind).convert_tokens_to_ids(
            "</s>" if kind in ("gpt2", "llama") else "[PAD]")
    torch.manual_seed(99)  # a head drawn anew, which the adapter's has to replace
    base = getattr(transformers, auto).from_pretrained(root / kind, config=config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def stock_metrics(model, run):
    outcomes = [run.task.outcome(model(**run.task.inputs(batch)), batch) for batch in run.evaluator.batches]
    return measured(run.task, outcomes)[0]


@pytest.mark.long
@pytest.mark.parametrize("kind, task, head, rule", [
    ("bert", CLASSIFY, "frozen", "lora"), ("bert", CLASSIFY, "mixed", "tad"), ("bert", CLASSIFY, "local", "rolora"),
    ("bert", CLASSIFY, "mixed", "decaf"), ("roberta", CLASSIFY, "mixed", "lora"), ("gpt2", CLASSIFY, "local", "decaf"),
    ("llama", GENERATE, "frozen", "lora"), ("gpt2", GENERATE, "frozen", "ffa")])
def test_stock_peft_loads_what_the_run_evaluated(root, tmp_path, kind, task, head, rule):
    config = make_config(root, tmp_path / "run", kind, model__task=task, lora__head=head, method=rule, train__rounds=2)
    assert running.train(config) == 0
    run, _ = tiny_runs.make_run(config)
    check_stock(root, kind, task, tmp_path / "run", run)


def check_stock(root, kind, task, output, run, **changes):
    folder = checkpoint.latest(output)
    recorded = read_lines(output / "metrics.jsonl")[-1]["eval"]
    if task != GENERATE:
        changes |= {"num_labels": 2}
    found = [stock_metrics(stock(root, kind, task, folder / f"peer-{peer}", **changes), run) for peer in range(4)]
    for name, values in recorded["peers"].items():
        assert [metrics[name] for metrics in found] == values  # to the last bit
        assert len(set(values)) > 1 or name == "accuracy"  # the peers differ
    assert stock_metrics(stock(root, kind, task, folder / "consensus", **changes), run) == recorded["consensus"]


def test_stock_peft_loads_a_model_cut_to_fewer_layers(root, tmp_path):
    config = make_config(root, tmp_path / "run", model__layers=1, train__rounds=2, lora__rslora=True)
    running.train(config)
    check_stock(root, "bert", CLASSIFY, tmp_path / "run", tiny_runs.make_run(config)[0], num_hidden_layers=1)


def test_stock_peft_loads_image_adapters(root, tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for k in range(16):
        image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{k}.png")
    (root / "images.jsonl").write_text("\n".join(json.dumps({"image": f"{k}.png", "label": "ab"[k % 2]}) for k in range(16)))
    config = make_config(root, tmp_path / "run", "vit", "images.jsonl", model__task=IMAGES, train__rounds=2, lora__head="mixed")
    running.train(config)
    check_stock(root, "vit", IMAGES, tmp_path / "run", tiny_runs.make_run(config)[0])


def test_a_saved_adapter_names_its_base_and_is_ready_for_inference(root, tmp_path):
    config = make_config(root, tmp_path / "run", train__rounds=1, method="decaf")
    running.train(config)
    folder = checkpoint.latest(tmp_path / "run")
    about = json.loads((folder / "peer-3" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(root / "bert") and about["inference_mode"] is True
    assert about["peft_type"] == "LORA" and about["r"] == 2
    assert "product" in json.loads((folder / "consensus" / "consensus.json").read_text())["consensus"]


@pytest.mark.parametrize("rule", ["lora", "decaf"])
def test_the_consensus_is_the_mean_of_factors_or_the_best_part_of_the_mean_product(root, tmp_path, rule):
    config = make_config(root, tmp_path / "run", train__rounds=3, train__lr=0.1, method=rule, lora__head="mixed", lora__alpha=3)
    running.train(config)
    folder, layout = checkpoint.latest(tmp_path / "run"), tiny_runs.make_run(config)[0].peers.layout
    rows, saved = tiny_runs.rows_of(folder, 4), load_file(folder / "consensus" / "adapter_model.safetensors")
    for pair in layout.pairs:
        a, b = (saved[f"base_model.model.{pair.name}.lora_{k}.weight"].double() for k in "AB")
        all_a, all_b = a_view(rows, pair).double(), b_view(rows, pair).double()
        if rule == "lora":
            torch.testing.assert_close((a, b), (all_a.mean(0), all_b.mean(0)), rtol=1e-5, atol=1e-6)
        else:
            u, s, vh = torch.linalg.svd((all_b @ all_a).mean(0))
            best = (u[:, :pair.rank] * s[:pair.rank]) @ vh[:pair.rank]
            torch.testing.assert_close(b @ a, best, rtol=1e-4, atol=1e-6)
            assert float((best - all_b.mean(0) @ all_a.mean(0)).norm()) > 1e-4 * float(best.norm())  # not the same thing
    for tensor in layout.head:
        name = f"base_model.model.{tensor.name}"
        torch.testing.assert_close(saved[name], head_view(rows, tensor).mean(0), rtol=1e-5, atol=1e-6)


def test_there_is_nothing_but_safetensors_and_json(root, tmp_path):
    running.train(make_config(root, tmp_path / "run", train__rounds=2, checkpoint__every=1, train__state="carried"))
    files = [p for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    adapter = next(p for p in files if p.name == "adapter_model.safetensors")
    held = sum(t.nbytes for t in load_file(adapter).values())
    assert adapter.stat().st_size < held + 8000  # a view does not carry the rows beside it


def halted_and_resumed(config, monkeypatch, *stops):
    for number, rounds in enumerate(stops):
        tiny_runs.stop_after(running, rounds, patch=monkeypatch.setattr)
        assert running.train(config, resume=number > 0) == running.STOPPED
    monkeypatch.undo()
    assert running.train(config, resume=True) == 0


def state_of(output):
    return load_file(checkpoint.latest(output) / "state-0.safetensors")


def assert_same_run(one, other):
    """The same bits in rows, rule states and moments, the same adapters, the same records but for the clock."""
    assert checkpoint.latest(one).name == checkpoint.latest(other).name
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for path in checkpoint.latest(one).glob("*/adapter_model.safetensors"):
        assert path.read_bytes() == (checkpoint.latest(other) / path.parent.name / path.name).read_bytes()
    lines = [[{k: v for k, v in record.items() if k not in ("seconds",)} for record in read_lines(run / "metrics.jsonl")]
             for run in (one, other)]
    assert lines[0] == lines[1]


CARRIED = {"train__state": "carried"}
RESUMED = {
    "adf, in mid phase": {"method": "{name: adf, T: 3}"},
    "adf, moments across rounds": {"method": "{name: adf, T: 3}", **CARRIED},
    "tad, moments across a switch": {"method": "{name: tad, T: 2}", **CARRIED, "train__at_switch": "carried"},
    "rolora with a local head": {"method": "rolora", **CARRIED, "lora__head": "local"},
    "decaf": {"method": "decaf", **CARRIED, "lora__head": "mixed"},
    "sgd with momentum": {"method": "lora", **CARRIED, "train__optimizer": "sgd", "train__momentum": 0.9},
    "sgd without": {"method": "lora", **CARRIED, "train__optimizer": "sgd"},
    "schedule": {"method": "lora", "train__schedule": "cosine", "train__warmup": 0.3},
    "dropout": {"method": "lora", "model__dropout": 0.2, "lora__dropout": 0.2},
    "random graph, epochs": {"method": "ffa", "topology": "{name: erdos_renyi, p: 0.4}", "train__local_steps": None,
                             "train__local_epochs": 1, "partition": "{name: quantity, skew: 1.0}"},
    "stacked": {"method": "{name: adf, T: 3}", **CARRIED, "train__executor": "stacked"},
}


@pytest.mark.long
@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_is_never_stopped(root, tmp_path, monkeypatch, case):
    fields = {"train__rounds": 7, "eval__every": 3, "lora__targets": "[query,value]", "model__layers": 1} | RESUMED[case]
    straight = make_config(root, tmp_path / "straight", **fields)
    assert running.train(straight) == 0
    halted_and_resumed(make_config(root, tmp_path / "halted", **fields), monkeypatch, 2, 3)  # after rounds 2 and 5
    assert_same_run(tmp_path / "straight", tmp_path / "halted")


@pytest.mark.long
def test_the_moments_make_a_difference(root, tmp_path):
    """Else the cases above would show nothing."""
    rows = []
    for number, fields in enumerate([{}, CARRIED, CARRIED | {"train__at_switch": "carried"}]):
        config = make_config(root, tmp_path / str(number), method="{name: tad, T: 2}", train__rounds=5, model__layers=1, **fields)
        running.train(config)
        rows.append(state_of(tmp_path / str(number))["x.0"])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


@pytest.mark.long
def test_a_resumed_run_may_be_made_longer(root, tmp_path):
    fields = {"method": "{name: adf, T: 2}", **CARRIED, "eval__every": 1}
    running.train(make_config(root, tmp_path / "straight", train__rounds=5, **fields))
    running.train(make_config(root, tmp_path / "longer", train__rounds=3, **fields))
    running.train(make_config(root, tmp_path / "longer", train__rounds=5, **fields), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "longer")


def test_resume_of_a_finished_run_changes_nothing(root, tmp_path):
    config = make_config(root, tmp_path / "run", train__rounds=2)
    running.train(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert running.train(config, resume=True) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()} == before
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def flip(path, at=-3):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGED = {"train__rounds": 4, "checkpoint__every": 1, "method": "{name: tad, T: 2}", **CARRIED, "model__layers": 1}


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "run"
    running.train(make_config(root, output, **DAMAGED))
    return output


@pytest.mark.long
@pytest.mark.parametrize("damage", ["bit", "missing", "cut", "manifest", "empty manifest", "other round", "a list"])
def test_damage_is_noticed_and_the_checkpoint_before_is_taken(root, straight, tmp_path, damage):
    shutil.copytree(straight, tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run").name == "round-00004"
    broken = tmp_path / "run" / "checkpoints" / "round-00004"
    adapter, told = broken / "peer-2" / "adapter_model.safetensors", broken / "manifest.json"
    if damage == "bit":
        flip(adapter)
    elif damage == "missing":
        adapter.unlink()
    elif damage == "cut":
        adapter.write_bytes(adapter.read_bytes()[:-10])
    elif damage == "manifest":
        told.write_bytes(told.read_bytes()[:40])
    elif damage == "empty manifest":
        told.write_text("")
    elif damage == "other round":
        told.write_text(told.read_text().replace('"rounds": 4', '"rounds": 5'))
    else:
        told.write_text("[]")
    with pytest.raises(checkpoint.UnreadableError, match="round-00004"):
        checkpoint.verify(broken)
    assert checkpoint.latest(tmp_path / "run").name == "round-00003"
    assert running.train(make_config(root, tmp_path / "run", **DAMAGED), resume=True) == 0
    assert_same_run(straight, tmp_path / "run")


def test_only_the_newest_are_kept(root, tmp_path):
    running.train(make_config(root, tmp_path / "run", train__rounds=5, checkpoint__every=2, checkpoint__keep=2))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["round-00004", "round-00005"]


def saver(root, folder, keep=2):
    """Saves the state of an assembled run under a number of rounds of our choice."""
    run, loaded = tiny_runs.make_run(make_config(root, folder))
    writer = checkpoint.Checkpointer(folder, InProcess(), 0, "base", keep)
    rows = run.rows()
    return lambda rounds: writer.save(rounds, loaded.adapted, run.peers.ids, run.peers.x, rows, {}, (rows.row(0), "mean"))


def published(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_rounds_are_ordered_as_numbers(root, tmp_path):
    save = saver(root, tmp_path)
    for rounds in (99_998, 99_999, 100_000):
        save(rounds)
    (tmp_path / "checkpoints" / "round-00001.copy").mkdir()  # somebody's own
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["round-99999", "round-100000"]
    assert checkpoint.latest(tmp_path).name == "round-100000"


def test_a_damaged_later_checkpoint_does_not_displace_a_new_one(root, tmp_path):
    save = saver(root, tmp_path, keep=1)
    save(20)
    flip(tmp_path / "checkpoints" / "round-00020" / "state-0.safetensors")
    save(10)  # the run went on from before
    assert published(tmp_path) == ["round-00010"] and checkpoint.latest(tmp_path).name == "round-00010"


def test_a_draft_is_never_taken_for_a_checkpoint(root, tmp_path, monkeypatch):
    save = saver(root, tmp_path)
    save(1)
    whole = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    for step in ("replace", "fsync"):  # killed before the name is given, and while the manifest is written
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save(2)
        assert published(tmp_path) == [".round-00002.draft", "round-00001"]
        assert checkpoint.latest(tmp_path).name == "round-00001"
    save(2)
    assert published(tmp_path) == ["round-00001", "round-00002"]
    assert {p: p.read_bytes() for p in whole} == whole


# ends by a signal in the middle of the file
KILLED = """
import resource, signal, sys
import numpy as np
from safetensors.numpy import save_file
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
save_file({"x": np.zeros(1_000_000)}, sys.argv[1])
"""


@pytest.mark.parametrize("name", ["state-0.safetensors", "peer-0/adapter_model.safetensors", "consensus/adapter_model.safetensors"])
def test_killed_inside_a_file_leaves_nothing_that_stays(root, tmp_path, name):
    """Whatever name the file has until it is whole."""
    save = saver(root, tmp_path)
    save(1)
    path = tmp_path / "checkpoints" / ".round-00002.draft" / name
    path.parent.mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGXFSZ
    assert len(list(path.parent.iterdir())) == 1
    assert checkpoint.choose(tmp_path, InProcess()).name == "round-00001"
    assert published(tmp_path) == ["round-00001"]


@pytest.mark.parametrize("fails", ["adapter", "state", "manifest", "publish"])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_draft(root, tmp_path, monkeypatch, fails):
    save = saver(root, tmp_path)
    save(1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_disk_as_safetensors_says_it(tensors, path, **kwargs):
        if fails in path:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **kwargs)

    sync = checkpoint._sync
    if fails == "manifest":
        monkeypatch.setattr(checkpoint, "_sync", lambda path: full_disk() if path.name == "manifest.json" else sync(path))
    elif fails == "publish":
        monkeypatch.setattr(checkpoint.os, "replace", full_disk)
    else:
        for module in (checkpoint, saving):
            monkeypatch.setattr(module, "save_file", full_disk_as_safetensors_says_it)
    with pytest.raises(OSError, match="round-00002 could not be written.*No space left"):
        save(2)
    assert published(tmp_path) == ["round-00001"]
    assert checkpoint.verify(checkpoint.latest(tmp_path)) == 1


def test_a_kill_while_a_checkpoint_of_the_same_round_is_replaced_loses_none(root, tmp_path, monkeypatch):
    """Only one is kept: after every step of the replacement a start finds the old one or the new one, and no leftovers."""
    save = saver(root, tmp_path, keep=1)
    save(3)
    replace = os.replace
    for moves in (0, 1, 2):  # killed before the old one is laid aside, before the new one takes its place, and after that
        left = iter([replace] * moves)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "replace", lambda *names, left=left: next(left, killed)(*names))
            if moves == 2:
                patch.setattr(checkpoint, "complete", killed)
            with pytest.raises(KeyboardInterrupt):
                save(3)
        assert published(tmp_path) != ["round-00003"] or moves == 2
        assert checkpoint.choose(tmp_path, InProcess()).name == "round-00003"
        assert published(tmp_path) == ["round-00003"]


def killed(*args):
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_the_file(root, tmp_path, caplog):
    save = saver(root, tmp_path)
    save(1)
    save(2)
    flip(tmp_path / "checkpoints" / "round-00002" / "peer-1" / "adapter_model.safetensors")
    assert checkpoint.latest(tmp_path).name == "round-00001"
    said = [record.getMessage() for record in caplog.records if record.name == "dfl.store.checkpoints"]
    assert len(said) == 1 and "WARNING" in said[0] and "round-00002: peer-1/adapter_model.safetensors is missing or damaged" in said[0]


def test_half_a_removal_is_no_checkpoint(root, tmp_path, monkeypatch):
    """The oldest is removed from its manifest on: a kill in between does not leave something that looks damaged."""
    save = saver(root, tmp_path, keep=1)
    save(1)
    with monkeypatch.context() as patch:
        removed = []
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path, *args, **more: killed() if removed else removed.append(unlink(path, *args, **more)))
        with pytest.raises(KeyboardInterrupt):
            save(2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["round-00002"] and "round-00001" in published(tmp_path)


def test_a_checkpoint_without_the_part_of_a_process_is_not_published(root, tmp_path):
    """As on machines whose output folders have the same name and are not the same."""
    run, loaded = tiny_runs.make_run(make_config(root, tmp_path))
    transport = InProcess()
    transport.size = 2
    writer = checkpoint.Checkpointer(tmp_path, transport, 0, "base")
    with pytest.raises(OSError, match="process 0 does not see what process 1 wrote.*all processes share"):
        writer.save(1, loaded.adapted, run.peers.ids, run.peers.x, run.rows(), {}, None)
    assert published(tmp_path) == []


class OtherFails(InProcess):
    """Another process reports, once it has written, that its disk is full."""

    size, steps = 2, 0

    def agree(self, value):
        self.steps += isinstance(value, bool)
        return value or self.steps > 1 if isinstance(value, bool) else value

    def share(self, data):
        return [data, b"OSError its disk is full"]


def test_when_another_process_fails_nothing_is_published(root, tmp_path):
    run, loaded = tiny_runs.make_run(make_config(root, tmp_path))
    writer = checkpoint.Checkpointer(tmp_path, OtherFails(), 0, "base")
    with pytest.raises(OSError, match="process 1: its disk is full"):
        writer.save(1, loaded.adapted, run.peers.ids, run.peers.x, run.rows(), {}, None)
    assert published(tmp_path) == []


def test_states_are_found_whichever_process_wrote_them(root, tmp_path):
    running.train(make_config(root, tmp_path / "run", train__rounds=2, method="decaf", **CARRIED))
    folder = checkpoint.latest(tmp_path / "run")
    whole = {name: value.clone() for name, value in load_file(folder / "state-0.safetensors").items()}  # its file is written over
    for process, peers in enumerate((("0", "1", "2"), ("3",))):
        save_file({k: v for k, v in whole.items() if k.split(".")[1] in peers}, folder / f"state-{process}.safetensors")
    told = manifest.read(folder)
    digests = {**told.digests, **{path.name: manifest.digest_of_file(path) for path in folder.glob("state-*")}}
    (folder / "manifest.json").write_text(told._replace(digests=digests).text())
    found = checkpoint.read_state(folder, [1, 3])
    assert found.keys() == {name for name in whole if name.split(".")[1] in "13"}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    assert torch.equal(tiny_runs.rows_of(folder, 4), torch.stack([whole[f"x.{peer}"] for peer in range(4)]))
    with pytest.raises(checkpoint.UnreadableError, match="lacks peer 4"):
        checkpoint.read_state(folder, [3, 4])


def test_evaluating_a_run_again_gives_its_last_numbers(root, tmp_path):
    running.train(make_config(root, tmp_path / "run", train__rounds=2, method="decaf", lora__head="local"))
    again = evaluation.evaluate_run(tmp_path / "run")
    recorded = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval"]
    assert {key: again[key] for key in recorded} == recorded and again["round"] == 2


def test_what_a_run_on_a_gpu_remembers_goes_back_where_it_was():
    """A device without memory stands for the GPU: what went there could not be read again."""
    one, gpu = torch.zeros(2), torch.device("meta")
    tree = {"rule": {"0": {"mass": one, "residual": one}},
            "sent": {"0": {"bytes.A": one, "numel.A": one, "meta.ranks": one, "known": one}},
            "received": {"0/1": {"part.A": one, "meta.ranks": one}}}
    home = placed(tree, {"rule": {"0": {"mass": one}}}, gpu)
    there = {f"{slot}.{key}.{name}" for slot, held in home.items() for key, state in held.items() for name, value in state.items()
             if value.device == gpu}
    assert there == {"rule.0.residual", "sent.0.bytes.A", "received.0/1.part.A"}
    assert trees.flatten(home).keys() == trees.flatten(tree).keys()


def test_a_note_of_a_message_is_taken_off_the_gpu():
    assert bits_of(torch.ones(1)).device.type == "cpu"
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # it is asked for; the device without memory has none
        bits_of(torch.ones(1, device="meta"))
