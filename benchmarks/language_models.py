"""Language models on real text: docstrings, conversations and preferences made of them, four peers. Writes one stamped JSON.

    DFL_DATA=... python benchmarks/language_models.py run       # a minute a study on one core
    python benchmarks/language_models.py table                  # the README's table from the committed results

DFL_DATA holds stories260k: 260,032 parameters of the Llama architecture, trained on TinyStories (llama2.c, Karpathy). Each study is
a run by `dfl train` with the same run without mixing beside it, and a merged model that stock transformers loads and asks.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from dfl.config import DataConfig
from dfl.store.records import read_lines
from dfl.tasks import docstrings

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "language_models.json"
COMMON = {"peers": 4, "lora.rank": 16, "lora.alpha": 32, "lora.targets": "all-linear", "method": "decaf", "topology": "ring",
          "train.rounds": 20, "train.local_steps": 10, "train.batch_size": 8, "train.lr": 5e-3, "train.schedule": "cosine",
          "train.warmup": 0.1, "eval.every": 10, "baseline": "local", "data.source": "file", "data.max_length": 128,
          # every peer has the text of other packages
          "partition.name": "column", "partition.column": "package", "measure.layers": 0}
STUDIES = {
    "docstrings": ("perplexity", {"model.task": "causal_lm", "data.text": "text", "data.packing": "true"}),
    "conversations": ("perplexity", {"model.task": "causal_lm", "data.messages": "messages", "data.template": "plain",
                                     "eval.generate.examples": 40, "eval.generate.max_new_tokens": 32}),
    "preferences": ("accuracy", {"model.task": "preference", "model.task.beta": 0.1, "data.prompt": "prompt", "data.max_length": 64,
                                 "train.rounds": 10, "eval.every": 5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("run", "table"))
    parser.add_argument("--only", choices=list(STUDIES), action="append", help="this study alone; may be given several times")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "dfl-language-models")
    args = parser.parse_args()
    if args.study == "table":
        print(table())
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    write_data(args.scratch)
    for name in args.only or STUDIES:
        execute(name, args.scratch)
        stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        found = stored | {name: summarise(name, args.scratch)}
        RESULT.write_text(json.dumps({study: found[study] for study in STUDIES if study in found}, indent=1) + "\n")
    print(table())


def write_data(folder: Path, size: int = 1500) -> None:
    """The same docstrings three times: as text, as somebody who goes on where the user ends, and as that against the same words in
    another order. (Against the end of another docstring, which only its subject gives away, a model of this size stays at chance.)"""
    data = DataConfig(max_train=size, max_valid=size // 10)
    for name, table in zip(("train", "valid"), docstrings.load(data, masked=False)[:2], strict=True):
        texts, packages = table.columns["text"], table.columns["label"]
        rows = [{"text": text, "package": package} for text, package in zip(texts, packages, strict=True)]
        pairs = [(" ".join(words[:8]), " ".join(words[8:28]), package)
                 for words, package in zip(map(str.split, texts), packages, strict=True) if len(words) > 12]
        talks = [{"messages": [{"role": "user", "content": f"Go on: {start}"}, {"role": "assistant", "content": rest}],
                  "package": package} for start, rest, package in pairs]
        preferred = [{"prompt": start, "chosen": f" {rest}", "rejected": f" {shuffled(rest)}", "package": package}
                     for start, rest, package in pairs if len(set(rest.split())) > 3]
        for study, lines in (("docstrings", rows), ("conversations", talks), ("preferences", preferred)):
            (folder / f"{study}-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shuffled(text: str) -> str:
    """Its words in another order, the same for the same text."""
    words, draw = text.split(), random.Random(text)
    while (found := draw.sample(words, len(words))) == words:
        pass
    return " ".join(found)


def execute(name: str, scratch: Path) -> None:
    """One run in a process of its own, and its merged consensus."""
    _, fields = STUDIES[name]
    output = scratch / name
    overrides = COMMON | {"model.name": f"{os.environ['DFL_DATA']}/stories260k", "data.train": f"{scratch}/{name}-train.jsonl",
                          "data.valid": f"{scratch}/{name}-valid.jsonl"} | fields
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    dfl("train", *words, "--processes", "1", "--threads", "1", "--resume", "--output", str(output))  # a finished one is left as it is
    dfl("export", str(output), "--merge", "--overwrite", "--output", str(scratch / f"{name}-merged"))


def summarise(name: str, scratch: Path) -> dict:
    """Before and after, by peer, consensus and alone, and what the merged model says to stock transformers."""
    metric, fields = STUDIES[name]
    output = scratch / name
    lines, alone = (read_lines(folder / "metrics.jsonl") for folder in (output, output / "baseline-local"))
    first, last = ([line["eval"] for line in lines if "eval" in line][k] for k in (0, -1))
    about = json.loads((output / "run.json").read_text())
    examples = sum(1 for _ in open(scratch / f"{name}-valid.jsonl"))
    return {"config": COMMON | fields, "metric": metric, "examples": examples,
            "before": first[metric]["mean"], "peers": last["peers"][metric],
            "consensus": last["consensus"][metric], "alone": alone[-1]["eval"]["peers"][metric], "evaluation": last,
            "message_bytes": sum(line.get("message_bytes", 0) for line in lines),
            "seconds": round(sum(sum(line.get("seconds", {}).values()) for line in lines), 1),
            "merged_says": ask(scratch / f"{name}-merged"),
            **{key: about[key] for key in ("versions", "hardware", "git_commit", "started")}}


def dfl(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dfl", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"dfl {' '.join(words)} failed:\n{done.stderr}")


def ask(folder: Path) -> dict[str, str]:
    """What stock transformers makes of a merged model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = "Returns the number of"
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Go on: Returns the number of"}], tokenize=False,
                                               add_generation_prompt=True)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    said = model.generate(**given, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return {"prompt": prompt, "answer": tokenizer.decode(said[0, given["input_ids"].shape[1]:], skip_special_tokens=True)}


def table() -> str:
    lines = ["| data | metric | before | peers | consensus | alone | MB sent |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, run in json.loads(RESULT.read_text()).items():
        digits = 1 if run["metric"] == "perplexity" else 3
        peers, alone = (f"{min(values):.{digits}f} to {max(values):.{digits}f}" for values in (run["peers"], run["alone"]))
        lines.append(f"| {name} | {run['metric']} | {run['before']:.{digits}f} | {peers} | {run['consensus']:.{digits}f} | {alone} "
                     f"| {run['message_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
