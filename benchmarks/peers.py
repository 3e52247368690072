"""The same job side by side: ours, plain gloo, gloo's all-reduce, Decent-DP, hivemind, Flower.

    python benchmarks/peers.py [SYSTEM ...]           # results/peers.json
    python benchmarks/peers.py --exchange [SYSTEM ...]  # results/peers_exchange.json: no forward and backward pass

Eight processes on a ring, five local steps, 1.18 MB a message (`side_by_side/job.py`); with `--exchange` what a round costs
beside them, but for an optimiser's step that has no gradient. Foreign systems are installed into
environments of their own beside this one's torch, under $DFL_RIVALS or the cache folder; what does not install, or does not end, is
left out with the reason. Every run has a network namespace of its own where that is allowed, whose loopback counts the bytes.
Repetitions take turns, so that a busy moment of the machine hits all.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "side_by_side"
ROOT = Path(__file__).parent.parent
PEERS, REPEATS = int(os.environ.get("PEERS", 8)), int(os.environ.get("REPEATS", 3))
WARM, ROUNDS, SECONDS = 4, 30, 400
FOREIGN = {"decent_dp": "decent-dp==0.2.3", "hivemind": "hivemind==1.1.12", "flower": "flwr==1.42.0"}
COUPLED = ("decent_dp", "ours_every_step")  # their exchange is a part of every step
NAMES = ("nothing", "plain_gloo", "ours", "ours_measured", "all_reduce", "decent_dp", "ours_every_step", "flower", "hivemind")
SHARED = ("torch", "numpy", "transformers", "peft", "tokenizers", "safetensors")


class NoFigureError(Exception):
    """Why a system has no figures."""


def main(words: list[str]) -> None:
    from stamp import write
    exchange = "--exchange" in words
    allowed = [name for name in NAMES if not exchange or name not in COUPLED]
    names = [word for word in words if word != "--exchange"] or allowed
    unknown = set(names) - set(allowed)
    if unknown:
        sys.exit(f"peers.py: {sorted(unknown)} not known here; allowed: {', '.join(allowed)}")
    os.environ["LOCAL_STEPS"] = str(0 if exchange else 5)
    runs, missing = {name: [] for name in names}, {}
    for _ in range(REPEATS):
        for name in names:
            if name not in missing:
                try:
                    runs[name].append(run(name))
                    print(name, runs[name][-1], flush=True)
                except NoFigureError as failed:
                    missing[name] = str(failed)
                    print(name, "left out:", failed, flush=True)
    write("peers_exchange" if exchange else "peers", {"peers": PEERS, "rounds": ROUNDS, "warm": WARM, "repeats": REPEATS,
                    "foreign": FOREIGN, "job": "side_by_side/job.py", "own_network": bool(namespace())},
          {"systems": table({name: found for name, found in runs.items() if found}), "left_out": missing})


def table(runs: dict[str, list[dict]]) -> list[dict]:
    """A row a system: medians over the repetitions, their range, and ratios to plain gloo of the same repetition."""
    rows = []
    for name, found in runs.items():
        times = [one["ms"] for one in found]
        row = {"system": name, "ms_a_round": round(statistics.median(times), 1), "range": [round(min(times), 1), round(max(times), 1)],
               "mb_on_the_wire_a_round": round(statistics.median(one["mb"] for one in found), 3),
               "accuracy": round(statistics.mean(one["accuracy"] for one in found), 4)}
        if "plain_gloo" in runs:
            ratios = [one["ms"] / plain["ms"] for one, plain in zip(found, runs["plain_gloo"], strict=False)]
            row["to_plain_gloo"] = round(statistics.median(ratios), 2)
        rows.append(row)
    return rows


def run(name: str) -> dict:
    """One run of a system: ms and MB a round, mean accuracy of the peers' models."""
    python = environment(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = [*namespace(), sys.executable, __file__, "--start", name, str(python), str(port), folder]
        with open(f"{folder}/errors", "w") as errors:
            begun = subprocess.Popen(words, stdout=errors, stderr=errors, start_new_session=True)
            try:
                code = begun.wait(SECONDS)
            except subprocess.TimeoutExpired:
                raise NoFigureError(f"did not end within {SECONDS} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(begun.pid, signal.SIGKILL)  # with daemons that some leave behind
        lines = [json.loads(path.read_text().splitlines()[-1]) for path in Path(folder).glob("*.json") if path.read_text().strip()]
        if code or len(lines) < PEERS:
            said = [line for line in Path(folder, "errors").read_text().splitlines() if line.strip()]
            raise NoFigureError(said[-1] if said else f"{len(lines)} of {PEERS} peers ended")
    began, ended = min(one["began"][0] for one in lines), max(one["ended"][0] for one in lines)
    sent = max(one["ended"][1] for one in lines) - min(one["began"][1] for one in lines)
    return {"ms": 1e3 * (ended - began) / ROUNDS, "mb": sent / ROUNDS / 1e6, "accuracy": sum(one["accuracy"] for one in lines) / PEERS}


def start(name: str, python: str, port: str, folder: str) -> int:
    """Inside of the network namespace: all processes of a system, which end with this one."""
    if namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PEERS), "LOCAL_WORLD_SIZE": str(PEERS), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port, "FLOWER_PORT": port, "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0",
                        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT), "RUN_FOLDER": folder}
    servers = []
    if name == "flower":
        words = [python, str(HERE / "flower.py"), port, str(WARM + ROUNDS + 1), str(PEERS)]
        servers.append(subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    peers = []
    for rank in range(PEERS):
        words = [python, str(HERE / "worker.py"), name, str(WARM), str(ROUNDS)]
        with open(f"{folder}/{rank}.json", "w") as out:
            peers.append(subprocess.Popen(words, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=out))
    codes = [peer.wait() for peer in peers]
    for server in servers:
        server.kill()
    return max(map(abs, codes))


@functools.cache
def namespace() -> list[str]:
    """The words before a command that give it a network of its own; none where that is not allowed."""
    words = ["unshare", "--net", "--map-root-user"]
    able = shutil.which("unshare") and shutil.which("ip") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if able else []


def environment(name: str) -> Path:
    """The interpreter for a system: this one, or that of an environment with its package beside our torch."""
    if name not in FOREIGN:
        return Path(sys.executable)
    folder = Path(os.environ.get("DFL_RIVALS", Path.home() / ".cache" / "dfl" / "rivals")) / FOREIGN[name]
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
        from importlib.metadata import version
        held.write("".join(f"{package}=={version(package).split('+')[0]}\n" for package in SHARED))
        held.flush()
        done = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "-c", held.name, FOREIGN[name]],
                              capture_output=True, text=True)
    if done.returncode:
        raise NoFigureError(f"pip install {FOREIGN[name]}: {done.stderr.strip().splitlines()[-1]}")
    (folder / "installed").touch()
    return python


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        sys.exit(start(*sys.argv[2:]))
    main(sys.argv[1:])
