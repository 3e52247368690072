"""Every rule on the SST-2 recipe, through the real launcher: three rounds on two processes, stopped after two and resumed.

    DFL_DATA=../shared/data python benchmarks/every_rule.py [--rules decaf fedhl] [--rounds 3]

Each rule runs once without interruption and once in two parts, both under `torchrun`; the adapters must be the same bits. Accuracy
after so few rounds says only that the loop works. One in three connections exists (p = 0.3); rules that need a static or a complete
graph get a ring or a complete one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stamp import write

from dfl.methods import METHODS

ROOT = Path(__file__).parent.parent
SHORT = {"data.max_train": 400, "data.max_valid": 100, "train.local_steps": 5, "train.lr": 0.01, "eval.every": 0, "processes": 1,
         "topology": "{name: edge_activation, base: complete, p: 0.3}", "device": "cpu"}
OF_A_RULE = {"fed_sb": {"lora.adapter": "sb"}, "ravan": {"lora.adapter": "ravan"}, "dora": {"lora.adapter": "dora"},
             "hira": {"lora.adapter": "hira"}, "flora": {"topology": "complete"}, "fedex_choco": {"topology": "ring"},
             "tad": {"method.T": 1}}


def torchrun(rule: str, output: Path, rounds: int, *more: str) -> float:
    """Seconds of the command, which must succeed."""
    fields = SHORT | {"method": rule} | OF_A_RULE.get(rule, {}) | {"train.rounds": rounds, "output": output}
    words = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
    command = [f"{Path(sys.executable).parent}/torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dfl", "train",
               "launch/recipes/sst2.yaml", *words, *more]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{rule}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def digests(output: Path) -> dict[str, str]:
    last = max((output / "checkpoints").glob("round-*"))
    return {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.glob("*/adapter_model.safetensors"))}


def one(rule: str, rounds: int, folder: Path) -> dict:
    seconds = torchrun(rule, folder / "whole", rounds)
    torchrun(rule, folder / "parts", rounds - 1)
    torchrun(rule, folder / "parts", rounds, "--resume")
    same = digests(folder / "whole") == digests(folder / "parts") and len(digests(folder / "whole")) == 11
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    return {"resumed_to_the_same_bits": same, "seconds": seconds, "message_bytes": sum(line.get("message_bytes", 0) for line in lines),
            "accuracy_before": lines[0]["eval"]["accuracy"]["mean"], "accuracy": last["eval"]["accuracy"]["mean"],
            "consensus": last["eval"]["consensus"]["accuracy"], "aggregation_error": last["measures"]["aggregation_error"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results = {}
    for rule in args.rules:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[rule] = one(rule, args.rounds, Path(folder))
            except RuntimeError as error:
                results[rule] = {"failed": str(error)[:300]}
                print(error, flush=True)
                continue
        row = results[rule]
        print(f"{rule:12} accuracy {row['accuracy_before']:.3f} -> {row['accuracy']:.3f}  consensus {row['consensus']:.3f}  "
              f"aggregation error {row['aggregation_error']:.3g}  {row['message_bytes'] / 1e6:.2f} MB  {row['seconds']:.0f} s  "
              f"{'resumed to the same bits' if row['resumed_to_the_same_bits'] else 'RESUMED TO OTHER BITS'}", flush=True)
    write("every_rule", vars(args), results)
    if not all(row.get("resumed_to_the_same_bits") for row in results.values()):
        raise SystemExit("a run failed, or ended in other bits when resumed")


if __name__ == "__main__":
    main()
