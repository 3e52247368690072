"""Time and memory a peer, with many peers a process: a real run on a small model, from its start to its checkpoint.

    python benchmarks/hosted.py

8, 64, 256 and 1,000 peers in one process, and 256 in 8, on a ring; a random BERT of two layers, LoRA of rank 4, one step a round, an
evaluation with measures and a checkpoint at the end. CPU seconds of all processes, since they share the cores of one machine. Imports
are done before the clock starts; `start_s` is from there to the first round on the wall's clock. Memory is what a process has at most
beyond what it had then; its parts are of the largest process.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

import torch

CASES = [(8, 1), (64, 1), (256, 1), (1000, 1), (256, 8)]
ROUNDS, RANK, WIDTH, LAYERS, EXAMPLES = 4, 4, 32, 2, 4
# where a run's time goes: (module, function, name)
STEPS = (("dfl.run.loop", "_local", "local"), ("dfl.run.loop", "_exchange", "exchange_and_mix"),
         ("dfl.run.loop", "evaluate", "evaluate"),
         ("dfl.run.loop", "measure", "measure"), ("dfl.run.checkpoint", "Checkpointer.save", "checkpoint"))
WORDS = "the a of and to graph tensor array model node peer round train mix is not good bad film how what who".split()


def main() -> None:
    from stamp import write
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, nargs="+", help="those of the table alone")
    wanted = parser.parse_args().peers
    rows = []
    for peers, processes in CASES:
        if wanted is None or peers in wanted:
            rows.append(in_a_process_of_its_own(peers, processes))
            print(rows[-1], flush=True)
    write("hosted", {"model": f"random BERT, {LAYERS} layers, width {WIDTH}", "rank": RANK, "topology": "ring", "rounds": ROUNDS,
                     "local_steps": 1, "load": os.getloadavg()}, {"cases": rows})


def in_a_process_of_its_own(peers: int, processes: int) -> dict:
    import multiprocessing
    with tempfile.TemporaryDirectory() as folder:
        worker = multiprocessing.get_context("spawn").Process(target=case, args=(peers, processes, folder))
        worker.start()
        worker.join()
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("told-*.json"))]
    assert len(found) == processes, f"{len(found)} of {processes} processes came to the end"
    total = {name: sum(one["cpu"].get(name, 0.0) for one in found) for name in found[0]["cpu"]}
    each = {f"{name}_cpu_ms_a_peer": round(1e3 * seconds / peers / (ROUNDS if name in ("local", "exchange_and_mix") else 1), 3)
            for name, seconds in total.items()}
    most = max(one["memory_mb"] for one in found)
    return {"peers": peers, "processes": processes, "start_s": round(max(one["start_s"] for one in found), 2), **each,
            "memory_mb": round(most, 1), "memory_kb_a_peer": round(1024 * most * processes / peers, 1)}


def case(peers: int, processes: int, folder: str) -> None:
    """One run; every process tells what it took."""
    import transformers  # noqa: F401

    from dfl.config import load
    from dfl.run.callbacks import Callback
    from dfl.run.train import train
    torch.set_num_threads(1)
    write_inputs(Path(folder), peers)
    cpu: dict[str, float] = {"all": 0.0, "start": 0.0}
    for module, path, name in STEPS:
        measure(module, path, name, cpu)

    class Told(Callback):
        def on_train_begin(self, run, control):
            self.start, cpu["start"] = time.perf_counter() - started, time.process_time() - (0 if run.process else base_cpu)

        def on_train_end(self, run, control):
            cpu["all"] = time.process_time() - (0 if run.process else base_cpu)
            told = {"cpu": cpu, "start_s": self.start, "memory_mb": memory("VmHWM") - base}
            Path(folder, f"told-{run.process}.json").write_text(json.dumps(told))

    fields = {"peers": peers, "processes": processes, "model.name": f"{folder}/bert", "data.source": "file",
              "data.train": f"{folder}/data.csv", "data.max_length": 16, "data.max_valid": 16, "lora.rank": RANK, "method": "lora",
              "topology": "ring", "partition": "iid", "train.rounds": ROUNDS, "train.local_steps": 1, "train.batch_size": EXAMPLES,
              "eval.every": 0, "device": "cpu", "threads": 1, "output": f"{folder}/run"}
    config = load(None, [f"--{key}={value}" for key, value in fields.items()])
    started, base_cpu, base = time.perf_counter(), time.process_time(), memory("VmRSS")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config, callbacks=[Told()])


def write_inputs(folder: Path, peers: int) -> None:
    """A small random model, and enough sentences that every peer has its own."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(["[UNK]", "[PAD]", *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_input_names": ["input_ids", "attention_mask"]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=64, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=2 * WIDTH,
        max_position_embeddings=64)).save_pretrained(folder / "bert")
    num = EXAMPLES * peers * 5 // 4 + 20
    lines = [f"{WORDS[k % 17]} {WORDS[k % 19]} {WORDS[k % 22]},{'yes' if k % 3 else 'no'}" for k in range(num)]
    (folder / "data.csv").write_text("text,label\n" + "\n".join(lines) + "\n")


def measure(module: str, path: str, name: str, into: dict[str, float]) -> None:
    """Add the CPU seconds inside a function to into[name]."""
    *owners, last = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, last)

    @functools.wraps(function)
    def timed(*arguments, **keywords):
        began = time.process_time()
        try:
            return function(*arguments, **keywords)
        finally:
            into[name] = into.get(name, 0.0) + time.process_time() - began

    setattr(owner, last, timed)


def memory(field: str) -> float:
    """MB of this process, by /proc."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


if __name__ == "__main__":
    main()
