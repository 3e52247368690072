"""Own scripts under the real torchrun: a patched trainer against `dfl train`, TRL on real text, stop and resume."""

import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import rows_of

from dfl.store.checkpoints import latest
from dfl.store.runs import read_run

TESTS = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(processes: int, *words, status: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(["torchrun", "--standalone", "--nproc-per-node", str(processes), *map(str, words)], cwd=cwd, text=True,
                          env=ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, capture_output=True)
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.core
@pytest.mark.parametrize(("method", "state"), [("tad", "fresh"), ("decaf", "carried")])
def test_a_patched_trainer_ends_where_dfl_train_does(tmp_path, method, state):
    """Three mixes, the same batches in the same order, the same optimiser; moments anew in every round, or carried and turned."""
    folder = tiny_runs.make_folder(tmp_path)
    config = tiny_runs.make_config(folder / "bert", folder / "data.csv", tmp_path / "run", peers=3, topology="star", method=method,
                                   train__rounds=3, train__local_steps=2, train__state=state, train__lr=0.01, model__dropout=0,
                                   eval__every=0)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    tiny_runs.train(config)
    expected = rows_of(latest(tmp_path / "run"), 3)
    torchrun(3, TESTS / "own_trainer.py", recipe, tmp_path / "script")
    found = torch.stack([torch.load(tmp_path / "script" / f"row-{k}.pt") for k in range(3)])
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    run = read_run(tmp_path / "script")
    assert run.done == 3 and run.finished and all(len(record["train_loss_peers"]) == 3 for record in run.records)
    losses = [record["train_loss"]["mean"] for record in read_run(tmp_path / "run").records[1:]]
    assert [record["train_loss"]["mean"] for record in run.records] == pytest.approx(losses, abs=1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_oldest_transformers_and_trl_that_we_name_keep_the_contract(tmp_path):
    """The newest are those of this environment. The tests of a patched trainer, and of DPOTrainer where there are data."""
    declared = configparser.ConfigParser()
    declared.read(TESTS.parent / "setup.cfg")
    wanted = declared["options"]["install_requires"] + declared["options.extras_require"]["trl"]
    oldest = [f"{name}=={re.search(rf'^{name}>=([0-9.]+)$', wanted, re.M)[1]}.0" for name in ("transformers", "trl")]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "old")]
    subprocess.run([*install, oldest[0], f"numpy=={version('numpy')}"], check=True)  # with what it wants older than the newest does
    subprocess.run([*install, "--no-deps", oldest[1]], check=True)  # which would bring a torch
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'old'}"}
    told = subprocess.run([sys.executable, "-c", "import transformers, trl; print(transformers.__version__, trl.__version__)"],
                          env=env, text=True, capture_output=True)
    assert told.stdout.split() == [one.partition("==")[2] for one in oldest], told.stderr
    tests = [TESTS / "pure" / "test_hf.py", f"{TESTS}/real/test_own_trainers.py::test_two_peers_of_a_dpo_script"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-5000:]
