"""The scripts and commands people start with, through the real launchers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from tiny_runs import adapter_digests

from dfl.run.runtime import num_cores

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent
QUICKSTART = "launch/recipes/quickstart.yaml"
SHORT = ["--train.rounds", "2", "--train.local_steps", "3", "--data.max_valid", "40"]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": sys.prefix,
               "HF_HUB_OFFLINE": "1"}
ENVIRONMENT.pop("OMP_NUM_THREADS", None)  # as a user has it: what a run computes may not depend on the cores


def run(*command: str, status: int = 0, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def torchrun(processes: int, *arguments: str, **options) -> subprocess.CompletedProcess:
    return run("torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "dfl", *arguments, **options)


@pytest.mark.core
def test_quickstart_script(tmp_path):
    done = run("bash", "launch/quickstart.sh", *SHORT, "--method", "{name: tad, T: auto}", "--output", str(tmp_path / "run"))
    table = done.stdout
    assert re.search(r"peer +before +after tad +local alone +on own data", table)
    assert len(re.findall(r"^[0-7](?: +[01]\.\d{4}){4}$", table, re.M)) == 8
    assert "consensus" in table and "PeftModel.from_pretrained" in table
    assert len(adapter_digests(tmp_path / "run")) == 9
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["facts"]["processes"] == min(num_cores(), 8) and about["hardware"]["threads"] == 1
    assert about["facts"]["method"]["reason"].startswith("phases end when the frozen factor keeps")
    again = json.loads(run("python", "-m", "dfl", "eval", str(tmp_path / "run")).stdout)
    recorded = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
    assert again["accuracy"] == recorded["accuracy"] and again["consensus"] == recorded["consensus"]


def test_hosting_does_not_matter(tmp_path):
    """With the recipe's defaults: processes of torchrun, of the command's own, or one; nothing says how many threads."""
    short, found = [*SHORT, "--baseline", "null"], {}
    starts = {f"own {k}": ["python", "-m", "dfl", "train", QUICKSTART, *short, "--processes", str(k)] for k in (1, 2, 4)}
    starts["default"] = starts["own 1"][:-2]
    starts |= {f"torchrun {k}": ["torchrun", "--standalone", "--nproc-per-node", str(k), *starts["default"][1:]] for k in (1, 2)}
    for name, command in starts.items():
        output = tmp_path / name.replace(" ", "-")
        run(*command, "--output", str(output))
        found[name] = adapter_digests(output)
        facts = json.loads((output / "run.json").read_text())
        assert facts["facts"]["processes"] == (int(name[-1]) if name[-1].isdigit() else min(num_cores(), 8))
        assert facts["hardware"]["threads"] == 1
    assert len(found["default"]) == 9 and len({json.dumps(digests) for digests in found.values()}) == 1, found


def test_srun_environment(tmp_path):
    """What `srun -n 2` sets on one node is enough for two processes to meet."""
    port = 20000 + os.getpid() % 20000
    shared = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(port - 20000), "SLURM_STEP_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    command = ["python", "-m", "dfl", "train", QUICKSTART, *SHORT, "--baseline", "null", "--output", str(tmp_path / "run")]
    tasks = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | shared | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for k in range(2)]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 process(es)" in outputs[0] and len(adapter_digests(tmp_path / "run")) == 9


@pytest.mark.core  # torchrun
def test_more_processes_than_peers_is_one_line(tmp_path):
    done = torchrun(2, "train", QUICKSTART, "--peers", "1", "--output", str(tmp_path / "run"), status=1)
    said = [line for line in done.stderr.splitlines() if line.startswith("dfl: ")]
    assert said == ["dfl: peers = 1 is fewer than the 2 processes; allowed: at least 2 peers, or at most 1 processes"]
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(1200)  # one document has dozens of commands
@pytest.mark.parametrize("document", documents.with_commands())
def test_every_command_of_the_documents(document, tmp_path):
    """In the document's order, as written, in a folder of somebody who has the recipes that documents give; the two scripts are
    given arguments that shorten them."""
    place = tmp_path / "place"
    place.mkdir()
    documents.workplace(place)
    for command in documents.commands(document):
        short = {"bash launch/quickstart.sh": f" {' '.join(SHORT)} --output {tmp_path}/quickstart",
                 "bash launch/test.sh": " --collect-only -q"}.get(command, "")
        run("bash", "-euc", command + short, cwd=ROOT if short else place)


@pytest.mark.parametrize("words", [["train", QUICKSTART, "--dry-run"], ["train", QUICKSTART, *SHORT],
                                   ["sweep", "launch/recipes/sweep.yaml", "--dry-run"]])
def test_nobody_reads_what_it_prints(tmp_path, words):
    """`dfl ... | head`: nothing is said of a broken pipe, and a run whose table nobody reads is done all the same."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "dfl", *words, "--output", str(tmp_path / "run")], cwd=ROOT, env=ENVIRONMENT,
                          stdout=write, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    os.close(write)
    assert done.returncode == 141
    assert not re.search("(?i)broken ?pipe|traceback|error", done.stderr), done.stderr
    assert ("--dry-run" in words) or len(adapter_digests(tmp_path / "run")) == 9
