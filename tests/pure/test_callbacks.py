"""Callbacks: which events come with what, a stop that all agree on, errors that name the callback, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml

import dfl
from dfl import sweep as sweeps
from dfl.cli import main
from dfl.run import train as running
from dfl.run.callbacks import CallbackError
from dfl.run.train import train
from dfl.store.records import read_lines


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("callbacks"))


def make_config(root, output, **fields):
    return tiny_runs.make_config(root / "bert", root / "data.csv", output, **fields)


class Diary(dfl.Callback):
    """Everything that happens, in order."""

    def __init__(self):
        self.lines, self.given = [], []

    def _note(self, event, run, given=None):
        self.lines.append(f"{event} {run.round}")
        self.given.append((event, run.round, given))

    def on_train_begin(self, run, control):
        self._note("begin", run)

    def on_round_end(self, run, control, record):
        self._note("round", run, record)

    def on_evaluate(self, run, control, evaluation):
        self._note("evaluate", run, evaluation)

    def on_save(self, run, control, folder):
        self._note("save", run, folder)

    def on_train_end(self, run, control):
        self._note("end", run)


class StopAfter(dfl.Callback):
    """Asks after a number of rounds."""

    def __init__(self, rounds=2):
        self.rounds = rounds

    def on_round_end(self, run, control, record):
        if run.round >= self.rounds:
            control.should_training_stop = True


class Broken(dfl.Callback):
    def on_round_end(self, run, control, record):
        if run.round == 2:
            raise ZeroDivisionError("no such\nnumber")


def test_every_event_in_its_order_with_what_was_recorded(root, tmp_path):
    diary = Diary()
    assert train(make_config(root, tmp_path / "run", checkpoint__every=3), callbacks=[diary]) == 0
    assert diary.lines == ["begin 0", "evaluate 0", "round 1", "round 2", "evaluate 2", "round 3", "save 3", "round 4", "evaluate 4",
                           "save 4", "end 4"]
    recorded = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [given for event, _, given in diary.given if event == "round"] == recorded[1:]
    assert [given for event, _, given in diary.given if event == "evaluate"] == [r["eval"] for r in recorded if "eval" in r]
    assert diary.given[-2][2] == tmp_path / "run" / "checkpoints" / "round-00004" and (diary.given[-2][2] / "manifest.json").is_file()


def test_a_callback_sees_the_run_and_changes_nothing(root, tmp_path):
    seen = {}

    class Meddler(dfl.Callback):
        def on_round_end(self, run, control, record):
            seen.update(config=run.config, output=run.output, peers=run.peers, place=(run.process, run.processes), row=run.row(3))
            record.clear()
            run.row(3).zero_()
            with pytest.raises(ValueError, match="peer = 7"):
                run.row(7)
            with pytest.raises(AttributeError):
                run.round = 9

    config = make_config(root, tmp_path / "run")
    assert train(config, callbacks=[Meddler]) == 0  # a class is as good as an instance
    assert train(make_config(root, tmp_path / "alone")) == 0
    assert tiny_runs.adapter_digests(tmp_path / "run") == tiny_runs.adapter_digests(tmp_path / "alone")
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")[-1]) > 3
    assert (seen["config"], seen["output"], seen["peers"], seen["place"]) == (config, tmp_path / "run", (0, 1, 2, 3), (0, 1))
    assert seen["row"].dtype == torch.float32 and bool(seen["row"].any())


@pytest.mark.long
class Noise(dfl.Callback):
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise on the embeddings of what is trained on."""

    def on_train_begin(self, run, control):
        def noisy(module, inputs, output):
            return output + torch.rand_like(output).sub(0.5).mul(0.2) if module.training else None

        run.model.get_input_embeddings().register_forward_hook(noisy)


@pytest.mark.parametrize("executor", ["sequential", "stacked"])
def test_a_hook_on_the_model_trains_otherwise_and_repeats(root, tmp_path, monkeypatch, executor):
    """Also where the run was stopped between two steps."""
    fields = {"train__executor": executor, "train__lr": 0.05, "train__rounds": 3}
    for name, given in (("plain", []), ("one", [Noise()]), ("two", [Noise()])):
        assert train(make_config(root, tmp_path / name, **fields), callbacks=given) == 0
    with monkeypatch.context() as patch:
        tiny_runs.stop_after(running, 1, 1, patch=patch.setattr)
        assert train(make_config(root, tmp_path / "halves", **fields), callbacks=[Noise()]) == running.STOPPED
    assert train(make_config(root, tmp_path / "halves", **fields), callbacks=[Noise()], resume=True) == 0
    plain, one, two, halves = (tiny_runs.adapter_digests(tmp_path / name) for name in ("plain", "one", "two", "halves"))
    assert one == two == halves != plain
    first = [read_lines(tmp_path / name / "metrics.jsonl")[0]["eval"] for name in ("plain", "one")]
    assert first[0] == first[1]  # nothing of it is in an evaluation


def test_a_run_that_a_callback_ends_is_done(root, tmp_path, capsys):
    diary = Diary()
    config = make_config(root, tmp_path / "run", train__rounds=9, eval__every=1)
    assert train(config, callbacks=[diary, StopAfter(2)]) == 0
    out, err = capsys.readouterr()
    assert "ended after round 3, as test_callbacks:StopAfter asked" in err and "accuracy on the evaluation examples" in out
    assert diary.lines[-2:] == ["save 3", "end 3"]
    assert json.loads((tmp_path / "run" / "ended.json").read_text()) == {"round": 3, "callback": "test_callbacks:StopAfter"}
    # who goes on all the same ends where a run without the callback ends
    assert train(config, resume=True) == 0 and not (tmp_path / "run" / "ended.json").exists()
    assert train(make_config(root, tmp_path / "whole", train__rounds=9, eval__every=1)) == 0
    assert tiny_runs.adapter_digests(tmp_path / "run") == tiny_runs.adapter_digests(tmp_path / "whole")


def test_the_baseline_has_no_callbacks(root, tmp_path):
    diary = Diary()
    assert train(make_config(root, tmp_path / "run", baseline="local"), callbacks=[diary, StopAfter(1)]) == 0
    assert diary.lines[-1] == "end 2" and diary.lines.count("begin 0") == 1
    assert len(read_lines(tmp_path / "run" / "baseline-local" / "metrics.jsonl")) == 5


def test_an_error_names_the_callback_and_the_place(root, tmp_path):
    with pytest.raises(CallbackError) as caught:
        train(make_config(root, tmp_path / "run", checkpoint__every=1), callbacks=[Broken()])
    assert str(caught.value).startswith("callback test_callbacks:Broken failed in on_round_end after round 2: "
                                        "ZeroDivisionError: no such number (test_callbacks.py, line ")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    # round 1 is saved, and the run goes on from there
    assert train(make_config(root, tmp_path / "run", checkpoint__every=1), resume=True) == 0


HOOKS = '''
import dfl

class Half(dfl.Callback):
    def on_round_end(self, run, control, record):
        control.should_training_stop = run.round >= run.config.train.rounds // 2 - 1

class Flaky(dfl.Callback):
    def on_train_begin(self, run, control):
        mark = run.output.parent / "tried"
        if not mark.exists():
            mark.touch()
            raise OSError("the first time it fails")

class NeedsMore(dfl.Callback):
    def __init__(self, path):
        pass

class Other:
    pass
'''


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """A module of the user's own beside the recipe, under a name of its own; the working directory is there."""
    name = f"hooks_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(HOOKS)
    (tmp_path / f"{name}_torn.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return name


def arguments(root, output, *callbacks) -> list[str]:
    return [*tiny_runs.arguments(root / "bert", root / "data.csv", output), "--callbacks", f"[{', '.join(callbacks)}]"]


def test_a_recipe_names_callbacks_of_the_working_directory(root, tmp_path, hooks):
    assert main(["train", *arguments(root, tmp_path / "run", f"{hooks}:Half")]) == 0
    assert json.loads((tmp_path / "run" / "ended.json").read_text()) == {"round": 2, "callback": f"{hooks}:Half"}
    assert f"callbacks:\n- {hooks}:Half\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert main(["train", *arguments(root, tmp_path / "run"), "--resume"]) == 0  # without it
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["round"] == 4


BAD = [
    ("hooks", ["'hooks' names no class", "package.module:Class"]), (":Half", ["names no class"]), ("{hooks}:", ["names no class"]),
    ("no_such_module:Half", ["'no_such_module:Half'", "cannot be imported", "No module named 'no_such_module'"]),
    ("dfl.nothing:Half", ["cannot be imported", "No module named 'dfl.nothing'"]),
    ("{hooks}:Hlaf", ["has no 'Hlaf' (did you mean 'Half'?)"])]
# what only somebody knows who has run the code
EXECUTED = [("{hooks}_torn:nothing_of_that_name", ["cannot be imported", "No module named 'nothing_of_that_name'",
                                                   "_torn.py, line 1"]),
            ("{hooks}:Other", ["is no subclass of dfl.Callback"]), ("{hooks}:NeedsMore", ["cannot be made without arguments", "path"])]


@pytest.mark.parametrize("reference, parts", BAD + EXECUTED)
def test_a_bad_reference_is_refused_when_the_run_is_configured(root, tmp_path, hooks, capsys, reference, parts):
    words = ["train", *arguments(root, tmp_path / "run", f"'{reference.replace('{hooks}', hooks)}'")]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dfl: callbacks = ") and err.count("\n") == 1 and not (tmp_path / "run").exists()
    for part in parts:
        assert part in err
    assert main([*words, "--dry-run"]) == (2 if (reference, parts) in BAD else 0)
    if (reference, parts) in BAD:
        assert capsys.readouterr() == ("", err)


def test_a_dry_run_executes_no_code_of_the_recipe_and_says_that_there_is_some(root, tmp_path, hooks, capsys):
    (tmp_path / "evil").mkdir()
    for name in ("evil/__init__.py", "evil/inner.py"):
        (tmp_path / name).write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'done')!r}).write_text('x')\nclass Evil: pass\n")
    assert main(["train", *arguments(root, tmp_path / "run", "evil.inner:Evil", f"{hooks}:Half"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# callbacks = evil.inner:Evil, {hooks}:Half: this recipe names code, which a run imports and executes")
    assert yaml.safe_load(out)["callbacks"] == ["evil.inner:Evil", f"{hooks}:Half"]
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(json.dumps({"recipe": {"callbacks": "evil:Evil"}, "grid": {"seed": [0, 1]}, "output": str(tmp_path / "out")}))
    assert main(["sweep", str(recipe), "--dry-run"]) == 0
    assert not (tmp_path / "done").exists() and "evil" not in sys.modules and not (tmp_path / "run").exists()
    assert main(["train", *arguments(root, tmp_path / "run", "evil.inner:Evil")]) == 2 and (tmp_path / "done").exists()


def test_what_is_no_callback_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="no dfl.Callback"):
        train(make_config(root, tmp_path / "run"), callbacks=[print])
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line_of_the_command(root, tmp_path, hooks, capsys):
    assert main(["train", *arguments(root, tmp_path / "run", f"{hooks}:Flaky")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dfl: ")]
    assert said == [f"dfl: callback {hooks}:Flaky failed in on_train_begin after round 0: OSError: the first time it fails "
                    f"({hooks}.py, line 13)"]


def test_in_a_sweep_a_run_that_is_ended_is_finished_and_a_bad_reference_is_found_first(root, tmp_path, hooks, capsys):
    recipe, run, output = tmp_path / "sweep.yaml", make_config(root, "unused").to_dict(), str(tmp_path / "out")
    recipe.write_text(json.dumps({"recipe": run, "grid": {"callbacks": [[f"{hooks}:Half"], [f"{hooks}:Hlaf"]]}, "output": output}))
    assert main(["sweep", str(recipe)]) == 2
    assert f"run 1 (callbacks = ['{hooks}:Hlaf'])" in capsys.readouterr().err and not (tmp_path / "out").exists()
    recipe.write_text(json.dumps({"recipe": run | {"callbacks": [f"{hooks}:Half"]}, "grid": {"seed": [0, 1]}, "output": output}))
    assert main(["sweep", str(recipe), "--index", "1"]) == 0
    assert [(r.state, r.done) for r in sweeps.read(Path(tmp_path / "out"))] == [("waiting", 0), ("finished", 2)]
