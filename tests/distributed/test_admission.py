"""Processes that do not belong together refuse each other before the first round, and those that resume take the same checkpoint."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from processes import distributed, run_processes
from safetensors.torch import load_file, save_file
from tiny_models import save
from tiny_runs import adapter_digests, make_config, write_data
from tiny_runs import stop_after as stop_after_rounds

from dfl import config as configuration
from dfl.run import checkpoint, folder
from dfl.run import train as running
from dfl.store import lease
from dfl.store.records import read_lines
from dfl.transport import handshake

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("admission")
    write_data(root)
    save(root / "bert", "bert")
    return root


def config_of(root, output, **fields) -> dict:
    fields = {"method": "{name: tad, T: 2}", "train__state": "carried", "model__layers": 1, "eval__every": 3, "timeout": 60} | fields
    return make_config(root / "bert", root / "data.csv", output, **fields).to_dict()


def worker(rank: int, trees: list[dict], resume: bool = False, stop_after: int = 0) -> str:
    """`train` with the tree of each process; what it says."""
    folder.SHARED_SECONDS = lease.SHARED_SECONDS = 0.5
    if stop_after:
        stop_after_rounds(running, stop_after)
    try:
        return f"status {running.train(configuration.from_dict(trees[min(rank, len(trees) - 1)]), resume=resume)}"
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def all_say(results: list[str], kind: str, *parts: str) -> None:
    for said in results:
        assert said.startswith(f"{kind}: ") and all(part in said for part in parts), results


# -- the company ----------------------------------------------------------------------------------------------------------


def altered(root, what: str) -> dict:
    """The settings of a process that has other data or another model."""
    tree = config_of(root, root / "refused")
    if what == "data":
        other = root / "other.csv"
        other.write_text((root / "data.csv").read_text().replace("good film", "bad film", 1))
        tree["data"]["train"] = str(other)
    else:
        other = root / "other-model"
        shutil.copytree(root / "bert", other, dirs_exist_ok=True)
        weights = load_file(other / "model.safetensors")
        weights["embeddings.word_embeddings.weight"][0, 0] += 0.1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        tree["model"]["name"] = str(other)
    return tree


@pytest.mark.parametrize("what, field", [
    ("seed", "seed = 5, but 0 on process 0"), ("data", "evaluation examples = |training examples = "), ("model", "base model = ")])
def test_a_process_that_does_not_belong_is_refused_by_all(root, what, field):
    tree = config_of(root, root / "refused")
    other = tree | {"seed": 5} if what == "seed" else altered(root, what)
    results = run_processes(worker, 3, [tree, tree, other])
    all_say(results, "ValueError", "process 2 (peer 3, host ", ") does not belong to this run: ")
    assert all(any(part in said for part in field.split("|")) for said in results), results
    assert not (root / "refused").exists()


def test_paths_may_differ_where_the_contents_do_not(root, tmp_path):
    shutil.copytree(root / "bert", tmp_path / "copy")
    shutil.copy(root / "data.csv", tmp_path / "copy.csv")
    tree = config_of(root, tmp_path / "run", train__rounds=1)
    other = config_of(root, os.path.relpath(tmp_path / "run"), train__rounds=1, threads=2)
    other["model"]["name"], other["data"]["train"] = str(tmp_path / "copy"), str(tmp_path / "copy.csv")
    assert run_processes(worker, 2, [tree, other]) == ["status 0"] * 2


def secret_worker(rank: int, secrets: list[str | None]) -> tuple[str, int, bool]:
    transport, told = distributed(3), []
    share, secret = transport.share, secrets[rank]
    transport.share = lambda data: (told.append(data), share(data))[1]
    try:
        handshake.check_secret(transport, {} if secret is None else {"DFL_SECRET": secret})
    except ValueError as error:
        return str(error), transport.run, False
    return "accepted", transport.run, secret is not None and any(secret.encode() in data for data in told)


def test_those_who_share_the_secret_share_the_run_number_and_never_say_it():
    first, again = (run_processes(secret_worker, 3, ["open sesame"] * 3) for _ in range(2))
    for results in (first, again):
        assert {said for said, *_ in results} == {"accepted"} and not any(told for *_, told in results)
        assert len({number for _, number, _ in results}) == 1
    assert first[0][1] != again[0][1]  # a message of an earlier start is not taken for one of this
    assert {said for said, *_ in run_processes(secret_worker, 3, [None] * 3)} == {"accepted"}


@pytest.mark.parametrize("stranger", [0, 1, 2])
@pytest.mark.parametrize("secret", ["open barley", None])
def test_a_process_without_the_secret_is_refused_by_all(stranger, secret):
    secrets = [secret if rank == stranger else "open sesame" for rank in range(3)]
    results = run_processes(secret_worker, 3, secrets)
    named = stranger or 1  # process 0 is the measure
    how = "DFL_SECRET is" if secret is None else "its DFL_SECRET is not that of process 0"
    for said, *_ in results:
        assert said.startswith(f"process {named} (peer {named}, ") and "does not belong to this run" in said and how in said


# -- the same checkpoint ---------------------------------------------------------------------------------------------------


def test_an_output_that_is_not_shared_is_refused_at_the_start(root, tmp_path):
    trees = [config_of(root, tmp_path / name) for name in ("here", "there")]
    all_say(run_processes(worker, 2, trees), "ValueError", "process 1 (", "must lie on a file system that all processes share")
    assert os.listdir(tmp_path) == []


def stopped(root, output, processes=2, after=2, **fields) -> dict:
    tree = config_of(root, output, checkpoint__every=1, train__rounds=5, **fields)
    assert run_processes(worker, processes, [tree], False, after) == [f"status {running.STOPPED}"] * processes
    return tree


def test_a_process_that_does_not_see_the_chosen_checkpoint_says_so_and_all_leave(root, tmp_path):
    tree = stopped(root, tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "checkpoints" / "round-00002")
    shutil.rmtree(tmp_path / "there" / ".dfl")
    (tmp_path / "there" / ".dfl").symlink_to(tmp_path / "here" / ".dfl")  # the lease is seen, as on a file system that lags behind
    before = (tmp_path / "here" / "metrics.jsonl").read_bytes()
    results = run_processes(worker, 2, [tree, tree | {"output": str(tmp_path / "there")}], True)
    all_say(results, "ValueError", "round-00002 has no readable manifest")
    assert results[0].startswith("ValueError: process 1 (peers 2 to 3, host ")
    assert (tmp_path / "here" / "metrics.jsonl").read_bytes() == before
    path = tmp_path / "there" / "checkpoints" / "round-00002"
    shutil.copytree(tmp_path / "here" / "checkpoints" / "round-00002", path)
    (path / "state-1.safetensors").write_bytes(b"cut")
    results = run_processes(worker, 2, [tree, tree | {"output": str(tmp_path / "there")}], True)
    all_say(results, "ValueError", "round-00002: state-1.safetensors is missing or damaged")


def test_all_go_on_from_the_checkpoint_that_process_0_finds_whole(root, tmp_path):
    """Process 0 passes over a damaged one, which another process might have taken."""
    tree = stopped(root, tmp_path / "run", after=3)
    adapter = tmp_path / "run" / "checkpoints" / "round-00003" / "peer-0" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-4])
    assert run_processes(worker, 2, [tree], True) == ["status 0"] * 2
    straight = tree | {"output": str(tmp_path / "straight")}
    assert run_processes(worker, 2, [straight]) == ["status 0"] * 2
    assert adapter_digests(tmp_path / "run") == adapter_digests(tmp_path / "straight")
    assert [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(6))


# -- another number of processes --------------------------------------------------------------------------------------------


RULES = {"tad": ({"method": "{name: tad, T: 2}"}, "moments."), "decaf": ({"method": "decaf", "lora__head": "mixed"}, "rule.")}


def states(output) -> dict[str, torch.Tensor]:
    """Rows, rule states and moments of all peers, whichever process wrote them."""
    found = {}
    for path in checkpoint.latest(output).glob("state-*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_with_another_number_of_processes(root, tmp_path, rule):
    """With what is carried: the optimiser's moments, or the state of the rule."""
    changes, carried = RULES[rule]
    fields = {"peers": 8, "train__rounds": 5, **changes}
    straight = config_of(root, tmp_path / "straight", **fields)
    assert run_processes(worker, 1, [straight]) == ["status 0"]
    expected = states(tmp_path / "straight")
    assert any(name.startswith(carried) for name in expected)
    halted = config_of(root, tmp_path / "halted", **fields)
    assert run_processes(worker, 4, [halted], False, 3) == [f"status {running.STOPPED}"] * 4
    for processes in (2, 1, 8):
        output = tmp_path / f"by-{processes}"
        shutil.copytree(tmp_path / "halted", output)
        assert run_processes(worker, processes, [halted | {"output": str(output)}], True) == ["status 0"] * processes
        found = states(output)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert adapter_digests(output) == adapter_digests(tmp_path / "straight")
        assert [line["round"] for line in read_lines(output / "metrics.jsonl")] == list(range(6))


# -- process 0 fails beside the mathematics -----------------------------------------------------------------------------------


def full_disk_worker(rank: int, tree: dict) -> tuple[str, float]:
    """The disk is full when process 0 writes the record of the second round."""
    from dfl.store import records
    write, started = records.JsonLines.write, time.monotonic()

    def full(self, line):
        if rank == 0 and line["round"] == 2:
            raise OSError(28, "the record could not be written: No space left on device", "metrics.jsonl")
        write(self, line)

    records.JsonLines.write = full
    said = worker(rank, [tree])
    return said, time.monotonic() - started


def test_all_leave_when_process_0_cannot_write_its_record(root, tmp_path):
    results = run_processes(full_disk_worker, 3, config_of(root, tmp_path / "run", timeout=50))
    assert "No space left" in results[0][0]
    for said, seconds in results[1:]:
        assert said.startswith("ConnectionError: process 0 (peers 0 to 1, host ") and "stopped in round 2: [Errno 28]" in said
        assert seconds < 30
    assert [json.loads(line)["round"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert Path(tmp_path / "run" / "recipe.yaml").exists()
