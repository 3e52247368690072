"""What a run is: frozen dataclasses. A field's comment says what it means; its type and default say what is allowed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Plugin:
    """A choice from a table: its name and its parameters. In a recipe `{name: tad, T: 5}`, or only `tad`."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    name: str = "minilm"  # the embedded MiniLM, a model folder, or a hub name
    task: str = "sequence_classification"
    layers: int | None = None  # keep only the first k transformer layers
    dropout: float | None = None  # the base model's own dropout; None: what its configuration says
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base weights
    head_std: float | None = None  # of a new head's weights; None: the model's initializer_range


@dataclass(frozen=True)
class DataConfig:
    source: str = "docstrings"  # docstrings, file or hub
    train: str | None = None  # file: path; hub: split
    valid: str | None = None
    name: str | None = None  # hub: data set name, with an optional configuration after a colon
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    response: str | None = None
    image: str = "image"
    max_length: int = 128  # tokens
    max_train: int | None = None  # examples
    max_valid: int | None = None
    valid_fraction: float = 0.1  # taken off train when no valid is given


@dataclass(frozen=True)
class RankConfig:
    """Ranks that differ from peer to peer: drawn from `choices`, or as large as the memory of each peer allows."""

    choices: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None  # how often each choice is drawn; None: equally
    budget_mb: float | tuple[float, ...] | None = None  # for factors, gradients and two moments, of every peer or of each
    largest: int = 64  # with budget_mb


@dataclass(frozen=True)
class LoraConfig:
    adapter: str = "lora"  # a kind of adapter; dora, hira, sb and ravan want the method of that name (sb: fed_sb)
    rank: RankConfig | tuple[int, ...] | int = 8  # one for all, a list with one a peer, or RankConfig
    alpha: tuple[float, ...] | float = 16.0  # one for all, or one a peer; the change of a weight is alpha / rank times B A
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None  # None: PEFT's own choice for the architecture
    rslora: tuple[bool, ...] | bool = False  # alpha / sqrt(rank) instead
    # of A and B; pissa and olora begin at the base weight's own directions. Of the bases of sb and ravan: kaiming draws them, gradient
    # takes the leading directions of the first gradient
    start: Literal["kaiming", "pissa", "olora", "gradient"] = "kaiming"
    start_samples: int = 64  # the examples of peer 0 that the first gradient is the mean over; all that it has where they are fewer
    start_step: float = 0.0  # the core begins where a step of gradient descent of this rate takes the base weight; 0: at zero
    heads: int = 4  # of a ravan adapter
    head: Literal["frozen", "mixed", "local"] = "frozen"


@dataclass(frozen=True)
class RatioConfig:
    """The learning rate of each group of trained numbers as a multiple of train.lr; 0: it stays as it is.

    LoRA+ gives B more than A, about 16 times (Hayou, Ghosh, Yu, 2024, arXiv 2402.12354).
    """

    A: float = 1.0
    B: float = 1.0
    M: float = 1.0  # what is trained beside A and B: the magnitudes of dora
    core: float = 1.0  # what is trained in place of A and B, by sb and ravan
    head: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    rounds: int = 20
    local_steps: int | None = 10
    local_epochs: int | None = None  # instead of local_steps
    batch_size: int = 16
    accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_ratio: RatioConfig = field(default_factory=RatioConfig)  # lr_ratio.B: 16 is LoRA+
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    clip: float | None = 1.0  # per peer, on the norm of its whole gradient
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0  # fraction of the run
    state: Literal["fresh", "carried"] = "fresh"  # optimiser moments across rounds
    at_switch: Literal["fresh", "carried"] = "fresh"  # and of a factor that becomes active again
    at_refactor: Literal["rotate", "reset", "keep"] = "rotate"  # and where mixing turns the basis: rotate the first, reset the second
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    executor: Literal["auto", "sequential", "stacked"] = "auto"


@dataclass(frozen=True)
class EvalConfig:
    every: int = 5  # rounds; 0: only before the first and after the last
    batch_size: int = 64
    consensus: bool = True  # evaluate the consensus model as well
    metrics: tuple[Plugin, ...] | None = None  # one or a list, the loss always beside them; null: the task's own
    # the metric that tables, pages and callbacks are about; null: the task's own where it is among eval.metrics, else their first
    primary: str | None = None


@dataclass(frozen=True)
class MeasureConfig:
    every: int | None = None  # rounds; null: with every evaluation; 0: never
    layers: int = 10  # rounds between diagnostics layer by layer; 0: never


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # rounds; 0: by time
    minutes: float | None = 5.0  # with every = 0: at most so long between two, the first one early; null: only at the end
    keep: int = 2  # the newest


@dataclass(frozen=True)
class Config:
    peers: int = 8
    seed: int = 0
    topology_seed: int | None = None  # None: seed
    data_seed: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    method: Plugin = field(default_factory=lambda: Plugin("tad"))
    topology: Plugin = field(default_factory=lambda: Plugin("ring"))
    schedule: Plugin | None = None  # what trains and what is exchanged, round by round; None: as the method has it
    rule: Plugin | None = None  # how what arrives is combined; None: as the method has it
    trigger: Plugin = field(default_factory=lambda: Plugin("always"))  # whether a peer speaks
    codec: Plugin = field(default_factory=lambda: Plugin("none"))  # how a message becomes bytes
    channel: Plugin = field(default_factory=lambda: Plugin("perfect"))  # what the way does to it
    network: Plugin = field(default_factory=lambda: Plugin("none"))  # how long things take, on a simulated clock
    guard: Plugin = field(default_factory=lambda: Plugin("norm"))  # what may enter a peer's mix: norm, or finite alone
    wrapper: Plugin = field(default_factory=lambda: Plugin("none"))  # an optimiser across peers
    partition: Plugin = field(default_factory=lambda: Plugin("iid"))
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    baseline: Literal["local"] | None = None  # also train without mixing, for the closing table
    plugins: tuple[str, ...] = ()  # modules that put rules, codecs, ... of their own into the tables; imported, also by a dry run
    # own hooks: package.module:Class of a dfl.Callback; one or a list. A run imports and executes them: such a recipe is code
    callbacks: tuple[str, ...] = ()
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, mlflow; one name or a list
    output: str = "runs/run"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    # of a plain `dfl train`, on CPU: the hosted peers are spread over so many; None: one for each core and peer that memory allows
    processes: int | None = None
    threads: int | None = None  # of each process; None: OMP_NUM_THREADS, else 1. Another number gives other bits
    # seconds to wait for a process that lives but does not answer: longer than the longest local phase and evaluation. Who is dead is
    # found at once, who is stopped or hangs within about a minute, whatever this is
    timeout: float = 1800.0

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def plain(value: Any) -> Any:
    if isinstance(value, Plugin):
        return {"name": value.name, **{k: plain(v) for k, v in value.params.items()}}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value
