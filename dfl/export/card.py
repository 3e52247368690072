"""The model card of an export: what the model is, how it was trained, what was measured, and how to load it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import topologies
from dfl import methods
from dfl.adapters.peft_layers import title
from dfl.config import Config
from dfl.export.ranks import total
from dfl.report.markdown import inline, row
from dfl.store.records import read_lines
from dfl.tasks import TASKS, embedded, read_fields

PIPELINES = {"sequence_classification": "text-classification", "sequence_regression": "text-classification",
             "causal_lm": "text-generation", "preference": "text-generation", "image_classification": "image-classification"}
_BY_HEAD = {"AutoModelForSequenceClassification": "text-classification", "AutoModelForCausalLM": "text-generation",
            "AutoModelForImageClassification": "image-classification"}


def pipeline(task: str) -> str | None:
    """What the hub calls a task; of one from another package by the head of its model, None where that says nothing."""
    return PIPELINES.get(task) or _BY_HEAD.get(getattr(TASKS.get(task), "auto_class", ""))


class Facts(NamedTuple):
    """What a card is written from. `settings` is the adapter's configuration; `losses` of `--rank`, `merged` of `--merge`."""

    config: Config
    record: dict[str, Any]  # run.json
    run: Path
    rounds: int
    peer: str  # a number, or consensus
    origin: str | None  # how a consensus was made
    base: str
    settings: dict[str, Any]
    losses: list
    merged: Any | None
    name: str | None  # under which it will be uploaded

    @property
    def evaluated(self) -> bool:
        """Whether the exported weights are those that the run evaluated, to the rounding of float32."""
        whole = self.merged is None or self.merged.dtype == self.config.model.dtype == "float32"
        return whole and not any(loss.relative > 1e-6 for loss in self.losses)


def render(facts: Facts) -> str:
    """The whole README.md."""
    parts = [f"# {inline(_title(facts))}", _what(facts), "## Training", _table(_training(facts)), _data(facts),
             "## Evaluation", _evaluation(facts), "## Use", _use(facts), "## Made with", _versions(facts)]
    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    return str(card)


def _title(facts: Facts) -> str:
    model = "consensus model" if facts.peer == "consensus" else f"model of peer {facts.peer}"
    return f"{_base_title(facts)}: {model} of a decentralised run"


def _base_title(facts: Facts) -> str:
    return (hub_name(facts) or Path(facts.base).name).rpartition("/")[2]


def hub_name(facts: Facts) -> str | None:
    """The base model's name on the hub, where it has one."""
    if facts.config.model.name == "minilm" and Path(facts.base).is_absolute():
        return embedded.HUB_NAME
    try:
        validate_repo_id(facts.base)
    except HFValidationError:
        return None
    return None if Path(facts.base).exists() else facts.base


def _metadata(facts: Facts) -> ModelCardData:
    config, base = facts.config, hub_name(facts)
    more: dict[str, Any] = {}
    if base:
        more = {"base_model": base, "base_model_relation": "finetune" if facts.merged else "adapter"}
    if config.data.source == "hub":
        more["datasets"] = [config.data.name.partition(":")[0]]
    results = _results(facts)
    if results:
        more |= {"eval_results": results, "model_name": facts.name or _base_title(facts)}
    tags = ["decentralized-training", "gossip", "lora", f"method:{config.method.name}", f"topology:{config.topology.name}"]
    return ModelCardData(library_name="transformers" if facts.merged else "peft", pipeline_tag=pipeline(config.model.task.name),
                         tags=tags, metrics=sorted({result.metric_type for result in results}) or None, **more)


def _results(facts: Facts) -> list[EvalResult]:
    """This model's own numbers, where what is exported is what was evaluated."""
    found = evaluation(facts)
    if not found or not facts.evaluated or _script(facts):
        return []
    kind, name = (" ".join(text.split()) for text in _data_set(facts.config, facts.config.data.valid or facts.config.data.train))
    task = pipeline(facts.config.model.task.name) or facts.config.model.task.name
    return [EvalResult(task_type=task, dataset_type=kind, dataset_name=name, dataset_split="validation", metric_type=metric,
                       metric_value=values["this"]) for metric, values in found.items() if values["this"] is not None]


def _data_set(config: Config, file: str) -> tuple[str, str]:
    """Its identifier and its name for people; of `file`, where the data are files, no path."""
    if config.data.source == "hub":
        return config.data.name.partition(":")[0], config.data.name
    if config.data.source == "file":
        return "file", Path(file).name
    return config.data.source, config.data.source


def evaluation(facts: Facts) -> dict[str, dict[str, float | None]]:
    """For each metric: this model, mean, smallest and largest over peers, consensus, and all of them before the first round.

    Empty where the run did not evaluate after this round.
    """
    path = facts.run / "metrics.jsonl"
    records = {line["round"]: line["eval"] for line in read_lines(path) if "eval" in line} if path.is_file() else {}
    last, first = records.get(facts.rounds), records.get(0, {})
    found = {}
    for metric, values in (last or {}).get("peers", {}).items():
        consensus = last.get("consensus", {}).get(metric)
        this = consensus if facts.peer == "consensus" else values[int(facts.peer)]
        found[metric] = {"this": this, "consensus": consensus, "before": first.get(metric, {}).get("mean"), **last[metric]}
    return found


def _what(facts: Facts) -> str:
    config, labels = facts.config, facts.record["facts"]["label_names"]
    name = title(facts.settings)
    kind = f"A whole model: {name} merged into" if facts.merged else f"A {name} adapter for"
    parts = [f"{kind} {_linked(facts)}, {_how(config)} {_whose(facts)}"]
    if config.model.layers:
        parts.append(f"The base model is cut to its first {config.model.layers} layers.")
    alpha = f", alpha {facts.settings['lora_alpha']:g}" if "lora_alpha" in facts.settings else ""
    rank = f"Rank {rank_text(facts.settings)}{alpha}, head {config.lora.head}, after round {facts.rounds}."
    parts.append(f"{rank} Labels: {inline(', '.join(labels[:50]))}{', ...' if len(labels) > 50 else ''}." if labels else rank)
    if facts.losses:
        parts.append(_lost(facts))
    if facts.merged:
        parts.append(f"Merged in float32, stored as {facts.merged.dtype}. On a random input the logits differ from the adapter's "
                     f"by {facts.merged.difference:.2g} at most (the largest logit is {facts.merged.largest:.2g}).")
    return "\n\n".join(parts)


def rank_text(settings: dict[str, Any]) -> str:
    """The rank of an adapter, or from which to which its layers have one."""
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    return str(settings["r"]) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _how(config: Config) -> str:
    if config.method.name == "local":
        return f"trained by each of {config.peers} peers alone on its own data: the baseline of a run that mixes."
    return (f"trained by gossip among {config.peers} peers without a server: every peer trained on its own data, exchanged factors "
            "with the neighbours a mixing matrix gave it, and mixed them.")


def _whose(facts: Facts) -> str:
    num = facts.config.peers
    if facts.peer != "consensus" and facts.config.method.name == "local":
        return f"It is the own model of peer {facts.peer} of {num} (the first is 0)."
    if facts.peer != "consensus":
        return (f"It is the own model of peer {facts.peer} of {num} (the first is 0): trained on that peer's data, mixed with "
                "its neighbours' factors.")
    head = "" if facts.config.lora.head == "frozen" else ", with the mean of their heads"
    return f"It is the consensus model of the {num} peers: the {facts.origin}{head}."


def _linked(facts: Facts) -> str:
    name = hub_name(facts)
    return f"`{name}`" if name else f"the model {inline(Path(facts.base).name)}"


def _lost(facts: Facts) -> str:
    rows = [["layer", "rank before", "relative error"]]
    rows += [[loss.layer, str(loss.rank), f"{loss.relative:.3g}"] for loss in facts.losses]
    return (f"The factors were refactored to rank {facts.settings['r']}, the best approximation of that rank of each layer's "
            f"ΔW. Relative Frobenius error of all layers together: {total(facts.losses):.3g}. By layer:\n\n{_table(rows)}")


def _training(facts: Facts) -> list[list[str]]:
    config, train = facts.config, facts.config.train
    steps = f"{train.local_steps} steps" if train.local_steps is not None else f"{train.local_epochs} epochs"
    chosen = facts.record["facts"].get("method") or facts.record["facts"].get("rule") or {}  # rule: of a run of the format before
    return [["", ""],
            ["method", f"{_plugin(config.method)}: {methods.describe().get(config.method.name, '')}"],
            *([["rule", _plugin(config.rule)]] if config.rule is not None else []),
            *([["chosen for the method", ", ".join(f"{key} = {value}" for key, value in chosen.items())]] if chosen else []),
            ["topology", f"{_plugin(config.topology)}: {topologies.describe().get(config.topology.name, '')}"],
            ["peers", str(config.peers)],
            *_trained_how(facts, steps),
            ["messages", f"codec {_plugin(config.codec)}"],
            ["seed", str(config.seed)]]


def _trained_how(facts: Facts, steps: str) -> list[list[str]]:
    """The rounds, and what optimises; of somebody's own script only what is known of it."""
    train, script = facts.config.train, _script(facts)
    if script:
        return [["rounds", f"{facts.rounds}, each of {steps} of the script {inline(script)}"]]
    return [["rounds", f"{facts.rounds}, each of {steps} of {train.batch_size} examples a peer"],
            ["optimiser", f"{train.optimizer}, learning rate {train.lr:g}{_ratios(train)}, {_plugin(train.schedule)}; "
                          f"moments {train.state} each round"]]


def _script(facts: Facts) -> str | None:
    """The script that trained, where it was not `dfl train`."""
    return facts.record["facts"].get("script")


def _ratios(train: Any) -> str:
    given = [f"{group} {ratio:g} times that" for group, ratio in vars(train.lr_ratio).items() if ratio != 1]
    return f" ({', '.join(given)})" if given else ""


def _plugin(plugin: Any) -> str:
    return plugin.name + "".join(f", {key} = {value}" for key, value in plugin.params.items())


def _data(facts: Facts) -> str:
    config, found = facts.config, facts.record["facts"]
    columns = [column for _, column in read_fields(config.model.task.name, config.data)]
    columns += [config.data.label] if getattr(TASKS.get(config.model.task.name), "labelled", False) else []
    held = found.get("shards", {}).get("examples")
    spread = f" ({min(held)} to {max(held)} examples a peer)" if held else ""
    if _script(facts):
        return (f"Trained on what the script gave each peer{spread}. What travelled were factors, never examples; factors may still "
                "tell something about the examples they were trained on.")
    trained, tested = (_data_set(config, file)[1] for file in (config.data.train, config.data.valid or config.data.train))
    held_out = (f"{found['num_valid']:,} evaluation examples " + (f"from {inline(tested)}" if config.data.valid else "held out of it")
                if config.data.source == "file" else f"{found['num_valid']:,} evaluation examples")
    return (f"Trained on {inline(trained)} (columns {inline(', '.join(columns))}), {found['num_train']:,} training examples; "
            f"{held_out}. Partition among the peers: {inline(_plugin(config.partition))}{spread}. What travelled were factors, never "
            "examples; factors may still tell something about the examples they were trained on.")


def _evaluation(facts: Facts) -> str:
    found = evaluation(facts)
    if not found:
        return f"The run did not evaluate after round {facts.rounds}. `dfl eval` measures this folder."
    own = {} if facts.peer == "consensus" else {"this peer": "this"}
    columns = {"before training": "before", **own, "mean over peers": "mean", "smallest": "min", "largest": "max",
               "consensus": "consensus"}
    ways = facts.record["facts"].get("better", {})
    rows = [["metric", "better", *columns]]
    rows += [[metric, ways.get(metric, "–"), *(_cell(v[key]) for key in columns.values())] for metric, v in found.items()]
    whose = "On the script's own" if _script(facts) else f"On the run's {facts.record['facts']['num_valid']:,}"
    text = f"{whose} evaluation examples, after round {facts.rounds}:\n\n{_table(rows)}"
    if not facts.evaluated:
        text += ("\n\nThese numbers were measured before the rank was lowered or the weights were rounded; "
                 "`dfl eval FOLDER --run RUN` measures this folder.")
    return text


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _table(rows: list[list[str]]) -> str:
    return "\n".join([row(rows[0]), row(["---"] * len(rows[0])), *map(row, rows[1:])])


def _use(facts: Facts) -> str:
    kind = TASKS[facts.config.model.task.name]
    processor = "AutoTokenizer" if kind.modality == "text" else "AutoImageProcessor"
    names = sorted([kind.auto_class, processor, *([] if facts.merged else ["AutoConfig"])])
    lines = [*([] if kind.modality == "text" else ["from PIL import Image"]),
             "import torch", *([] if facts.merged else ["from peft import PeftModel"]),
             f"from transformers import {', '.join(names)}", "",
             f"folder = {json.dumps(facts.name or '.')}" + ("" if facts.name else "  # where this file lies"),
             *_loading(facts, kind.auto_class),
             f"processor = {processor}.from_pretrained(folder)", *_example(facts)]
    return "```python\n" + "\n".join(lines) + "\n```"


def _loading(facts: Facts, auto: str) -> list[str]:
    if facts.merged:
        return [f'model = {auto}.from_pretrained(folder, dtype="{facts.merged.dtype}").eval()']
    # the base may have a head for other labels
    fits = "" if auto == "AutoModelForCausalLM" else ", ignore_mismatched_sizes=True"
    return ['config = AutoConfig.from_pretrained(folder, subfolder="base_config")',
            f"base = {auto}.from_pretrained({json.dumps(facts.base, ensure_ascii=False)}, config=config, "
            f'dtype="{facts.config.model.dtype}"{fits})',
            "model = PeftModel.from_pretrained(base, folder).eval()"]


def writes(config: Config) -> bool:
    """Whether the model goes on with a text."""
    return getattr(TASKS.get(config.model.task.name), "auto_class", None) == "AutoModelForCausalLM"


def talks(facts: Facts) -> bool | None:
    """Whether the model has learnt conversations; None where the run does not say, or has learnt no language."""
    return facts.record.get("facts", {}).get("conversations")


def _example(facts: Facts) -> list[str]:
    if writes(facts.config):
        if talks(facts):
            given = ['talk = [{"role": "user", "content": "A question."}]',
                     'inputs = processor.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)']
        else:
            given = ['inputs = processor("The", return_tensors="pt")']
        return [*given, "with torch.no_grad():",
                "    words = model.generate(**inputs, max_new_tokens=20, do_sample=False)", "print(processor.decode(words[0]))"]
    kind = TASKS[facts.config.model.task.name]
    inputs = 'processor("A text.", return_tensors="pt")' if kind.modality == "text" else \
        'processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")'
    said = "float(logits)" if kind.predicts == "number" else "model.config.id2label[int(logits.argmax())]"
    return [f"inputs = {inputs}", "with torch.no_grad():", "    logits = model(**inputs).logits", f"print({said})"]


def _versions(facts: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.record.get("versions", {}).items())
    commit = facts.record.get("git_commit")
    resumed = facts.record.get("resumed") or []
    later = f", resumed {len(resumed)} time{'s' if len(resumed) > 1 else ''}, last {resumed[-1]}" if resumed else ""
    return f"dfl{f' at commit {commit}' if commit else ''}; {versions}; begun {facts.record.get('started')}{later}."
