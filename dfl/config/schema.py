"""What a run is: frozen sections of fields. A type says what is allowed, a description what is meant (README.md is made of them)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import PydanticCustomError, core_schema

from dfl.config.recipes import number
from dfl.config.types import (
    NOT_ALLOWED,
    Count,
    CountOrZero,
    Folder,
    Fraction,
    Names,
    Path,
    Positive,
    PositiveOrZero,
    Several,
    Switch,
    Text,
    ZeroOrOne,
    one_or_list,
)


@dataclass(frozen=True)
class Plugin:
    """A choice from a table: its name and its parameters. In a recipe `{name: tad, T: 5}`, or only `tad`."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._read)

    @classmethod
    def _read(cls, value: Any) -> "Plugin":
        if isinstance(value, (Plugin, str)):
            return value if isinstance(value, Plugin) else cls(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise PydanticCustomError(NOT_ALLOWED, "{text}", {"text": "a name, or a mapping with name and the plug-in's parameters"})
        return cls(value["name"], {key: number(inner) for key, inner in value.items() if key != "name"})


Plugins = Annotated[tuple[Plugin, ...], BeforeValidator(lambda value: one_or_list(value, str, Mapping))]


class Section(BaseModel):
    """A part of a recipe, frozen; null is the same as leaving it out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, value: Any) -> Any:
        return {} if value is None else value


def said(default: Any, meaning: str, **more: Any) -> Any:
    """A field with what it means."""
    return Field(default, description=meaning, **more)


class ModelConfig(Section):
    name: Path = said("minilm", "the embedded MiniLM, a model folder, or a hub name")
    task: Plugin = said(Plugin("sequence_classification"), "sequence_classification, sequence_regression, causal_lm, preference or "
                                                           "image_classification")
    layers: Count | None = said(None, "keep only the first k transformer layers")
    dropout: Fraction | None = said(None, "the base model's own dropout; null: what its configuration says")
    dtype: Literal["float32", "bfloat16", "float16"] = said("float32", "of the frozen base weights")
    quantization: Literal["nf4", "fp4", "int8", "torchao_int8", "torchao_int4"] | None = said(
        None, "of the linear layers of a language model, in 4 or 8 bits: nf4, fp4 and int8 by bitsandbytes, the others by torchao")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = said(
        None, "its implementation; null: what transformers chooses")
    revision: Text | None = said(None, "of a model of the hub: a branch, a tag or a commit")
    trust_remote_code: Switch = said(False, "run the code that comes with a model: read it first")
    head_std: Positive | None = said(None, "of a new head's weights; null: the model's initializer_range")


class DataConfig(Section):
    source: Text = said("docstrings", "docstrings, file or hub")
    train: Path | None = said(None, "file: path; hub: split")
    valid: Path | None = said(None, "as data.train; null: a part of train is taken off")
    name: Text | None = said(None, "hub: data set name, with an optional configuration after a colon")
    text: Text = said("text", "the column of the text")
    pair: Text | None = said(None, "the column of a second text, as in entailment")
    label: Text = said("label", "the column of the label, a word or a number; of a regression, of the number")
    prompt: Text | None = said(None, "causal_lm, preference: the column of the prompt, which has no loss; texts or messages")
    response: Text | None = said(None, "causal_lm: the column of what is to be learnt, with data.prompt")
    chosen: Text = said("chosen", "preference: the column of the better response, or conversation")
    rejected: Text = said("rejected", "preference: of the worse one")
    messages: Text | None = said(None, "causal_lm: the column of conversations, lists of {role, content}")
    tools: Text | None = said(None, "the column of the tools of a conversation, for the chat template")
    system: Text | None = said(None, "the first message of conversations that have none of the role system")
    template: Text | None = said(None, "of conversations: a Jinja file, chatml or plain, or the template; null: the tokenizer's own")
    learn: Literal["responses", "last", "all"] = said(
        "responses", "of a conversation: what the assistant says, the last of it, or every token")
    image: Text = said("image", "the column of the image: a path beside the file, or an image")
    max_length: Count = said(128, "tokens")
    packing: Switch = said(False, "causal_lm: fill rows of max_length with several examples, none of which sees another")
    group_by_length: Switch = said(False, "batches of examples of similar length, in random order")
    streaming: Switch = said(
        False, "read and tokenise piece by piece into a cache on disk, for files that do not fit into memory")
    max_train: Count | None = said(None, "examples")
    max_valid: Count | None = said(None, "examples")
    valid_fraction: Fraction = said(0.1, "taken off train when no valid is given")
    flipped: Several[CountOrZero] | None = said(
        None, "label flip, for experiments with guards: peers that train on class C - 1 - c in place of class c")


class RankConfig(Section):
    """Ranks that differ from peer to peer: drawn from `choices`, or as large as the memory of each peer allows."""

    choices: Several[Count] | None = said(None, "ranks to draw from, one for each peer")
    weights: Several[PositiveOrZero] | None = said(None, "how often each choice is drawn; null: equally")
    budget_mb: Several[Positive] | Positive | None = said(
        None, "for factors, gradients and two moments, of every peer or of each")
    largest: Count = said(64, "with budget_mb")


class LoraConfig(Section):
    adapter: Text = said("lora", "a kind of adapter; dora, hira, sb and ravan want the method of that name (sb: fed_sb)")
    rank: RankConfig | Several[Count] | Count = said(8, "one for all, a list with one a peer, or a section")
    alpha: Several[Positive] | Positive = said(
        16.0, "one for all, or one a peer; the change of a weight is alpha / rank times B A")
    dropout: Fraction = said(0.0, "of the adapters' input, from a generator for each peer")
    targets: Text | Several[Text] | None = said(None, "null: PEFT's own choice for the architecture")
    rslora: Several[Switch] | Switch = said(False, "alpha / sqrt(rank) instead")
    start: Literal["kaiming", "pissa", "olora", "gradient"] = said(
        "kaiming", "of A and B; pissa and olora begin at the base weight's own directions. Of the bases of sb and "
                   "ravan: kaiming draws them, gradient takes the leading directions of the first gradient")
    start_samples: Count = said(
        64, "the examples of peer 0 that the first gradient is the mean over; all that it has where they are fewer")
    start_step: PositiveOrZero = said(
        0.0, "the core begins where a step of gradient descent of this rate takes the base weight; 0: at zero")
    heads: Count = said(4, "of a ravan adapter")
    head: Literal["frozen", "mixed", "local"] = said(
        "frozen", "a new head: frozen and common, mixed as the factors are, or local")


class RatioConfig(Section):
    """The learning rate of each group of trained numbers as a multiple of train.lr; 0: it stays as it is.

    LoRA+ gives B more than A, about 16 times (Hayou, Ghosh, Yu, 2024, arXiv 2402.12354).
    """

    A: PositiveOrZero = said(1.0, "of A")
    B: PositiveOrZero = said(1.0, "of B")
    M: PositiveOrZero = said(1.0, "what is trained beside A and B: the magnitudes of dora")
    core: PositiveOrZero = said(1.0, "what is trained in place of A and B, by sb and ravan")
    head: PositiveOrZero = said(1.0, "of a head that is trained")


class PrivacyConfig(Section):
    """Differential privacy of each peer's examples (DP-SGD; Abadi et al., 2016, arXiv 1607.00133)."""

    noise: PositiveOrZero | None = said(
        None, "the noise of a step's sum of gradients as a multiple of clip; null: no differential privacy")
    clip: Positive = said(1.0, "the largest norm of one example's gradient, over all trained factors together")
    delta: Positive = said(1e-5, "of the guarantee that run.json states, far below one over the number of examples")
    secret: Switch = said(
        False, "noise from the operating system: a run that protects, and does not repeat. Else it follows from the "
               "seed, for studies: who knows the seed can take it off")


class TrainConfig(Section):
    rounds: Count = said(20, "of local training and one exchange")
    local_steps: Count | None = said(10, "optimiser steps of each peer in a round")
    local_epochs: Count | None = said(None, "instead of local_steps")
    batch_size: Count = said(16, "examples of one peer in a step")
    accumulation: Count = said(1, "batches whose gradients make one step")
    optimizer: Text = said("adamw", "of each peer alone: adamw, sgd, rmsprop, nadam or radam; with bitsandbytes lion, "
                                    "adamw_8bit, lion_8bit, and on a GPU paged_ in front of adamw, lion and their 8-bit forms")
    # a rate of zero is the cheapest oracle of the mixing
    lr: PositiveOrZero = said(1e-3, "learning rate")
    lr_ratio: RatioConfig = said(RatioConfig(), "lr_ratio.B: 16 is LoRA+")
    weight_decay: PositiveOrZero = said(0.0, "decoupled for adamw")
    betas: Several[Fraction] = said((0.9, 0.999), "of adamw and its like", min_length=2, max_length=2)
    eps: Positive = said(1e-8, "of adamw and its like")
    momentum: PositiveOrZero = said(0.0, "of sgd and rmsprop")
    clip: Positive | None = said(1.0, "per peer, on the norm of its whole gradient")
    privacy: PrivacyConfig = said(PrivacyConfig(), "privacy.noise: 1.0 makes every step one of DP-SGD")
    schedule: Plugin = said(
        Plugin("constant"), "of the learning rate over the run: constant, linear, cosine, cosine_with_restarts, cosine_with_min_lr, "
                            "polynomial, inverse_sqrt or warmup_stable_decay")
    warmup: Fraction = said(0.0, "fraction of the run")
    state: Literal["fresh", "carried"] = said("fresh", "optimiser moments across rounds")
    at_switch: Literal["fresh", "carried"] = said("fresh", "and of a factor that becomes active again")
    at_refactor: Literal["rotate", "reset", "keep"] = said(
        "rotate", "and where mixing turns the basis: rotate the first, reset the second")
    gradient_checkpointing: Switch = said(False, "compute activations again in the backward pass: less memory, a third more work")
    # YAML 1.1 reads off as false
    autocast: Annotated[Literal["auto", "off", "bfloat16"], BeforeValidator(lambda value: "off" if value is False else value)] = said(
        "auto", "of the forward pass; auto: bfloat16 on a GPU")
    executor: Literal["auto", "sequential", "stacked"] = said(
        "auto", "hosted peers one after the other, or stacked in one pass; auto chooses")


class GenerateConfig(Section):
    """Answers that the models write themselves at every evaluation, greedily, to the first evaluation examples."""

    examples: CountOrZero = said(0, "how many examples every model answers; 0: none")
    max_new_tokens: Count = said(64, "of an answer")
    shown: CountOrZero = said(3, "answers of the consensus and of one peer that the record and the report hold")
    metric: Text | None = said(
        None, "package.module:function of the answers and the references, lists of texts; it gives a number, or several by name")


class EvalConfig(Section):
    every: CountOrZero = said(5, "rounds; 0: only before the first and after the last")
    batch_size: Count = said(64, "examples in a pass")
    consensus: Switch = said(True, "evaluate the consensus model as well")
    metrics: Plugins | None = said(None, "one or a list, the loss always beside them; null: the task's own")
    primary: Text | None = said(
        None, "the metric that tables, pages and callbacks are about; null: the task's own where it is among "
              "eval.metrics, else their first")
    generate: GenerateConfig = GenerateConfig()
    patience: Count | None = said(None, "end the run when so many evaluations in a row were no better than the best; null: never")
    min_delta: PositiveOrZero = said(0.0, "by how much an evaluation has to be better, for patience")


class MeasureConfig(Section):
    every: CountOrZero | None = said(None, "rounds; null: with every evaluation; 0: never")
    layers: CountOrZero = said(10, "rounds between diagnostics layer by layer; 0: never")


class CheckpointConfig(Section):
    every: CountOrZero = said(0, "rounds; 0: by time")
    minutes: Positive | None = said(
        5.0, "with every = 0: at most so long between two, the first one early; null: only at the end")
    keep: Count = said(2, "the newest")
    best: Switch = said(False, "keep the best model of each peer and of the consensus, by the primary metric, in the folder best")


class MembershipConfig(Section):
    """What becomes of a run that loses a process. `membership: survive` is short for mode."""

    mode: Literal["fixed", "survive"] = said(
        "fixed", "fixed: the run ends for all and is resumed, with equal bits; survive: the others go on without it, and it may "
                 "come back ([survivors](../../launch/SURVIVORS.md))")
    transport: Literal["tcp", "zenoh"] = said(
        "tcp", "survive: what carries the messages. tcp: within a network that is trusted; zenoh: also between sites, encrypted, "
               "every process with a certificate of its own")
    patience: Positive = said(30.0, "survive: seconds without a sign of life after which the others go on without a process")
    wait: Positive = said(300.0, "survive: seconds to wait at the start for those that have not come; later they join")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value


class Config(Section):
    peers: Count = said(8, "participants; any number in one process")
    seed: CountOrZero = said(0, "of adapters, heads, batches, dropout and whatever a rule draws")
    topology_seed: CountOrZero | None = said(None, "null: seed")
    data_seed: CountOrZero | None = said(
        None, "of the partition, the validation split, the subsets and the order of examples; null: seed")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    method: Plugin = said(Plugin("lora"), "fills the slots of a round; what to choose: [dfl/rules](../rules/README.md)")
    topology: Plugin = said(Plugin("ring"), "names and parameters: [topologies](../../topologies/README.md)")
    schedule: Plugin | None = said(
        None, "what trains and what is exchanged, round by round; null: as the method has it")
    rule: Plugin | None = said(None, "how what arrives is combined; null: as the method has it")
    trigger: Plugin = said(Plugin("always"), "whether a peer speaks")
    codec: Plugin = said(Plugin("none"), "how a message becomes bytes")
    channel: Plugin = said(Plugin("perfect"), "what the way does to it")
    network: Plugin = said(Plugin("none"), "how long things take, on a simulated clock")
    guard: Plugin = said(Plugin("norm"), "what may enter a peer's mix, and how much of it")
    wrapper: Plugin = said(Plugin("none"), "an optimiser across peers")
    delay: ZeroOrOne = said(
        0, "1: exchange while peers train, what they had at the end of the round before; each adds what it trained "
           "meanwhile")
    partition: Plugin = said(Plugin("iid"), "who holds which examples")
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    measure: MeasureConfig = MeasureConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    baseline: Literal["local"] | None = said(
        None, "also train by this method, which mixes nothing, for the closing table")
    plugins: Names = said(
        (), "modules that put rules, codecs, ... of their own into the tables; imported, also by a dry run")
    callbacks: Names = said(
        (), "own hooks: package.module:Class of a dfl.Callback; one or a list. A run imports and executes them: such "
            "a recipe is code")
    report_to: Names = said((), "tensorboard, wandb, mlflow, trackio; one name or a list")
    output: Folder = said("runs/run", "the run's folder")
    device: Literal["auto", "cpu", "cuda"] = said("auto", "auto: a GPU where torch sees one")
    backend: Literal["auto", "gloo", "nccl"] = said(
        "auto", "of torch.distributed; auto: nccl where each process has a GPU of its own, else gloo")
    deterministic: bool = said(False, "on a GPU only algorithms that give the same bits every time, attention written out; slower")
    processes: Count | None = said(
        None, "of a plain `dfl train`, on CPU: the hosted peers are spread over so many; null: one for each core and "
              "peer that memory allows")
    processes_per_peer: Count = said(
        1, "so many hold one base model in parts (FSDP), and share the batches of their peers "
           "([launch](../../launch/README.md#a-peer-of-several-processes))")
    membership: MembershipConfig = MembershipConfig()
    threads: Count | None = said(
        None, "of each process; null: OMP_NUM_THREADS, else 1. Another number gives other bits")
    timeout: Positive = said(
        1800.0, "seconds to wait for a process that lives but does not answer: longer than the longest local phase "
                "and evaluation. Who is dead is found at once, who is stopped or hangs within about a minute, "
                "whatever this is")

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type is, or may be."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it."""
    if isinstance(value, Plugin):
        return {"name": value.name, **{key: plain(inner) for key, inner in value.params.items()}}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (Section, Mapping)):
        return {key: plain(inner) for key, inner in dict(value).items()}
    return value
