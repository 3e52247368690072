"""What gossip gives a script with a trainer of its own: SFTTrainer and DPOTrainer on stories260k, transformers.Trainer on MiniLM.

Four peers under torchrun, each with the docstrings of other packages, on a ring, against the same peers alone. `run` is the study;
`worker` is such a script, which the tests start as well. DFL_DATA is a folder with stories260k/ and minilm-l6-fp16/.

    python benchmarks/own_scripts.py run
    torchrun --nproc-per-node 4 benchmarks/own_scripts.py worker sft runs/sft --steps 100 --method lora
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("sft", "dpo", "classify")
EVERY, PEERS = 10, 4
LENGTH = 96  # tokens


def texts(peer, skewed: bool = True, seed: int = 0):
    """The docstrings of this peer's packages, or as many of all of them, and 80 of all, which nobody trains on: (text, label)."""
    from dfl.config import DataConfig
    from dfl.tasks import docstrings
    train, valid, _ = docstrings.load(DataConfig(max_train=800, max_valid=80), masked=True, data_seed=seed)
    pairs, held = (list(zip(table.columns["text"], table.columns["label"], strict=True)) for table in (train, valid))
    if not skewed:
        return pairs[peer.rank::peer.size], held
    pairs.sort(key=lambda pair: str(pair[1]))
    share = len(pairs) // peer.size
    return pairs[peer.rank * share:(peer.rank + 1) * share], held


def halves(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[:len(words) // 2]) + " ", " ".join(words[len(words) // 2:])


def preferences(pairs):
    """How a docstring goes on after some words against the same words in another order; as many as LENGTH tokens hold."""
    from language_models import shuffled
    rows = [halves(" ".join(text.split()[:20])) for text, _ in pairs]
    return [{"prompt": prompt, "chosen": end, "rejected": shuffled(end)} for prompt, end in rows if len(set(end.split())) > 3]


def make(kind: str, peer, output: str, steps: int, resume: bool):
    """A trainer as somebody has it in a script, and what its models are measured by."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
    data = Path(os.environ["DFL_DATA"])
    common = {"output_dir": output, "max_steps": steps, "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True,
              "logging_steps": EVERY // 2, "eval_strategy": "steps", "eval_steps": EVERY, "save_steps": EVERY, "save_total_limit": 3,
              "disable_tqdm": True, "eval_on_start": not resume}
    # with a class or two of five each, neither mixed nor alone comes beyond chance in so few steps
    pairs, held = texts(peer, skewed=kind != "classify")
    if kind == "classify":
        names, folder = sorted({label for _, label in held}), data / "minilm-l6-fp16"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        import peft
        import torch
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names), num_hidden_layers=2,
                                                                   dtype=torch.float32)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
        sets = [[dict(tokenizer(text, truncation=True, max_length=64)) | {"labels": names.index(label)} for text, label in rows]
                for rows in (pairs, held)]
        args = TrainingArguments(learning_rate=1e-2, **common)
        return Trainer(peft.get_peft_model(model, lora), args, processing_class=tokenizer, train_dataset=sets[0], eval_dataset=sets[1],
                       compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())})
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    common |= {"max_length": LENGTH, "bf16": False, "gradient_checkpointing": False}
    model = str(data / "stories260k")
    if kind == "sft":
        rows = [Dataset.from_list([{"text": text} for text, _ in part]) for part in (pairs, held)]
        return SFTTrainer(model, args=SFTConfig(learning_rate=5e-3, **common), train_dataset=rows[0], eval_dataset=rows[1],
                          peft_config=lora)
    rows = [Dataset.from_list(preferences(part)) for part in (pairs, held)]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return DPOTrainer(model, args=DPOConfig(learning_rate=2e-3, **common), train_dataset=rows[0], eval_dataset=rows[1],
                      peft_config=lora, processing_class=AutoTokenizer.from_pretrained(model))


def measure(kind: str, trainer, model, peer) -> dict[str, float]:
    """Accuracy on the examples that nobody trains on; of a language model, the perplexity of their texts."""
    import torch
    if kind == "classify":
        kept, trainer.model = trainer.model, model
        found = trainer.evaluate()["eval_accuracy"]
        trainer.model = kept
        return {"accuracy": round(found, 4)}
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    model.eval()

    def loss(text: str, prompt: str = "") -> tuple[float, int]:
        """Of the tokens behind the prompt: their mean loss, and how many they are."""
        ids = tokenizer(prompt + text, return_tensors="pt", truncation=True, max_length=2 * LENGTH).input_ids
        skipped = tokenizer(prompt, return_tensors="pt").input_ids.shape[1] if prompt else 1
        labels = ids.clone()
        labels[:, :skipped] = -100
        return float(model(input_ids=ids, labels=labels).loss), max(1, ids.shape[1] - skipped)

    def margin(row) -> float:
        """By how much the log-likelihood of the words in their order is above that in the other."""
        (chosen, there), (rejected, here) = (loss(row[end], row["prompt"]) for end in ("chosen", "rejected"))
        return rejected * here - chosen * there

    with torch.no_grad():
        found = [loss(text) for text, _ in texts(peer)[1]]
        result = {"perplexity": round(math.exp(sum(mean * count for mean, count in found) / sum(count for _, count in found)), 3)}
        if kind == "dpo":
            rows = preferences(texts(peer)[1])
            here = [margin(row) for row in rows]
            with model.disable_adapter():
                base = [margin(row) for row in rows]
            result["right order likelier"] = share(value > 0 for value in here)
            # what DPO trains: the margin over that of the base model, so none before
            result["reward accuracy"] = share(value > before for value, before in zip(here, base, strict=True))
    return result


def share(found) -> float:
    found = list(found)
    return round(sum(found) / len(found), 4)


def worker(options) -> None:
    import dfl.hf
    peer = dfl.hf.join(method=options.method, topology="ring", every=EVERY, measure__every=1)
    trainer = dfl.hf.patch(make(options.kind, peer, options.output, options.steps, options.resume))
    found = {} if options.resume else {"before": measure(options.kind, trainer, trainer.model, peer)}
    trainer.train(resume_from_checkpoint=options.resume)
    found["after"] = measure(options.kind, trainer, trainer.model, peer)
    if peer.rank == 0:
        found["consensus"] = measure(options.kind, trainer, stock(options), peer)
    Path(options.output, f"measured-{peer.rank}.json").write_text(json.dumps(found))


def stock(options):
    """The consensus model as stock PEFT loads it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    (folder,) = Path(options.output, "checkpoints").glob("round-*")
    data = Path(os.environ["DFL_DATA"])
    if options.kind == "classify":
        base = AutoModelForSequenceClassification.from_pretrained(data / "minilm-l6-fp16", num_labels=5, num_hidden_layers=2,
                                                                  dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(data / "stories260k")
    return PeftModel.from_pretrained(base, folder / "consensus")


def start(kind: str, output: Path, steps: int, method: str, peers: int = PEERS,
          resume: bool = False) -> subprocess.CompletedProcess:
    """`worker` under torchrun."""
    command = ["torchrun", "--standalone", "--nproc-per-node", str(peers), __file__, "worker", kind, str(output),
               "--steps", str(steps), "--method", method, *(["--resume"] if resume else [])]
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"} | os.environ
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(command, env=env, capture_output=True, text=True)


def measured(output: Path, peers: int = PEERS) -> dict:
    found = [json.loads((output / f"measured-{k}.json").read_text()) for k in range(peers)]
    return {metric: {"before": found[0]["before"][metric], "after by peer": [one["after"][metric] for one in found],
                     "consensus": found[0]["consensus"][metric]} for metric in found[0]["after"]}


def run(options) -> None:
    import stamp
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for method in ("lora", "local"):
                done = start(kind, Path(folder, f"{kind}-{method}"), options.steps, method)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                results.setdefault(kind, {})["gossip" if method == "lora" else "alone"] = measured(
                    Path(folder, f"{kind}-{method}"))
                print(kind, method, results[kind], flush=True)
    stamp.write("own_scripts", {"peers": PEERS, "steps": options.steps, "every": EVERY, "method": "lora", "topology": "ring",
                                "batch": 8}, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("run")
    study.add_argument("--steps", type=int, default=150)
    script = commands.add_parser("worker")
    script.add_argument("kind", choices=KINDS)
    script.add_argument("output")
    script.add_argument("--steps", type=int, default=150)
    script.add_argument("--method", default="lora")
    script.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    {"run": run, "worker": worker}[options.command](options)


if __name__ == "__main__":
    main()
