"""Every cell of the study, in the order in which it counts. A new method gets its row in METHODS by one line.

A cell is a recipe of `launch/recipes` with overrides. What may be run depends on what has been found: a reported cell
waits for the rates of its method, and the search for rates for its own first cells. Nothing here runs anything.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from evidence import findings

TASKS = ("trec6", "sst2")
P_RATES, SEED_RATES, ROUNDS_RATES, ROUNDS, ROUNDS_CLAIMS = 0.1, 100, 30, 90, 30
SEEDS, MOST_SEEDS = 3, 5
# the field of a recipe that names the method
METHOD_FIELD = "method"
REGIME = {"model.layers": 3, "model.head_std": 0.3,
          "data.valid": None, "data.valid_fraction": 0.1, "data.max_valid": 872,
          "train.batch_size": 16, "train.local_steps": 20, "train.autocast": "off",
          "eval.every": 15, "measure.layers": 0,
          "plugins": ["benchmarks.evidence.packed", "benchmarks.evidence.balanced"],
          "callbacks": ["benchmarks.evidence.recorder:Recorder"], "processes": 1, "threads": 1}
RANKS = (2, 2, 2, 4, 4, 4, 8, 8, 8, 8)


class Entry(NamedTuple):
    """A method as a recipe names it, with parameters, and what else of the recipe makes it what it is. `rates`: the row
    whose rates it takes; None: it is tuned by itself.
    """

    name: str
    params: Mapping[str, Any] = {}
    overrides: Mapping[str, Any] = {}
    rates: str | None = None


GRAPHS: dict[str, dict[str, Any]] = {
    "ring": {"topology": "ring", "trigger": {"name": "periodic", "every": 2}},
    "one-peer": {"topology": "one_peer_exponential"},
    "base2": {"topology": {"name": "base_graph", "k": 1}},
    # the matchings of a complete graph are alike: equal probabilities are the optimum, and need no solver
    "matcha": {"topology": {"name": "matcha", "base": "complete", "budget": 1 / 9, "optimise": False}},
    "matching": {"topology": "random_matching"},
}
# rows of LoRA on these graphs
ON_GRAPHS = {f"lora-{graph}": graph for graph in GRAPHS}
# LoRA that gossips in the last fifth of its rounds, or not at all, and ends with one mean over all peers
LATE = {"lora-late": {"name": "late", "share": 0.2}, "lora-once": {"name": "late", "share": 0.0}}
# LoRA's own search came to a ratio of 1, so that its row of ratio 1 is `lora` itself
WITH_RATIOS = {
    **{f"lora-ratio{ratio}": Entry("lora", {}, {"train.lr_ratio.B": ratio}, rates="lora") for ratio in (10, 100)},
    **{f"tad5-ratio{ratio}": Entry("tad", {"T": 5}, {"train.lr_ratio.B": ratio}, rates="tad5") for ratio in (1, 10, 100)},
}
METHODS: dict[str, Entry] = {
    "lora": Entry("lora"),
    "ffa": Entry("ffa"),
    "rolora": Entry("rolora"),
    "tad1": Entry("tad", {"T": 1}),
    "tad3": Entry("tad", {"T": 3}),
    "tad5": Entry("tad", {"T": 5}),
    "tad15": Entry("tad", {"T": 15}),
    "tad": Entry("tad"),
    "decaf": Entry("decaf", {"gauge": "own"}),
    "flora_na": Entry("flora_na", rates="lora"),
    "fedrot": Entry("fedrot", rates="lora"),
    "local": Entry("local", rates="lora"),
    # unequal ranks
    "carry": Entry("carry", overrides={"lora.rank": RANKS}, rates="lora"),
    "fedhl": Entry("fedhl", overrides={"lora.rank": RANKS}, rates="lora"),
    "hetlora": Entry("hetlora", overrides={"lora.rank": RANKS}, rates="lora"),
    "decaf-ranks": Entry("decaf", {"gauge": "own"}, {"lora.rank": RANKS}, rates="decaf"),
    # other adapters
    "dora": Entry("dora", overrides={"lora.adapter": "dora"}, rates="lora"),
    "hira": Entry("hira", overrides={"lora.adapter": "hira"}),
    # ablations at p = 0.02
    "lora-half": Entry("lora", overrides={"train.local_steps": 10}, rates="lora"),
    "lora-balanced": Entry("balanced_average", rates="lora"),
    "lora-carried": Entry("lora", overrides={"train.state": "carried"}, rates="lora"),
    "tad5-carried": Entry("tad", {"T": 5}, {"train.state": "carried"}, rates="tad5"),
    "tad15-carried": Entry("tad", {"T": 15}, {"train.state": "carried"}, rates="tad15"),
    "lora-head": Entry("lora", overrides={"lora.head": "mixed"}, rates="lora"),
    "tad5-head": Entry("tad", {"T": 5}, {"lora.head": "mixed"}, rates="tad5"),
    "decaf-alternating": Entry("decaf", {"gauge": "own"}, {"schedule": {"name": "alternate", "T": 5}}, rates="tad5"),
    **WITH_RATIOS,
    # graphs with ten messages a round among ten peers (Base-2: 8.3), as many as the graph of p = 0.1 has (nine)
    **{method: Entry("lora", overrides=GRAPHS[graph], rates="lora") for method, graph in ON_GRAPHS.items()},
    **{method: Entry("lora", overrides={"trigger": trigger}, rates="lora") for method, trigger in LATE.items()},
}
CORE = ("lora", "tad5", "ffa", "tad15", "decaf")
DECIDING = ("lora", "ffa", "tad5", "tad15")
OTHERS = ("rolora", "tad1", "tad3", "tad", "flora_na", "fedrot")
ABLATIONS = ("lora-half", "lora-balanced", "lora-carried", "tad5-carried", "tad15-carried", "lora-head", "tad5-head",
             "decaf-alternating", *WITH_RATIOS)
UNEQUAL = ("carry", "fedhl", "hetlora", "decaf-ranks")
ADAPTERS = ("dora", "hira")


class Setting(NamedTuple):
    """Where one of the other claims is looked at: what readers are told of it, fields of the recipe beside the task's
    own, what is compared, and for how long.
    """

    label: str
    overrides: Mapping[str, Any]
    methods: tuple[str, ...]
    rounds: int = ROUNDS_CLAIMS
    seeds: int = SEEDS


P_CLAIMS = 0.1
SKEWED = ("lora", "flora_na", "decaf")
CLAIMS = {"short": Setting("600 steps", {}, (*SKEWED, "fedrot", *UNEQUAL, *ADAPTERS, *ON_GRAPHS, *LATE)),
          "half": Setting("half of one class", {"partition.fraction": 0.5}, SKEWED),
          "one": Setting("one class a peer", {"partition.fraction": 1.0}, SKEWED, seeds=1),
          # with 20 local steps nothing is learnt of the classes of others: as many steps, in ten times the rounds
          "one-often": Setting("one class a peer, 2 steps a round",
                               {"partition.fraction": 1.0, "train.local_steps": 2, "eval.every": 150}, SKEWED,
                               10 * ROUNDS_CLAIMS)}
# findings that came after results, to be asked of the other data: by setting the methods
REPEATED = {"short": ("lora-ring", "lora-one-peer", "lora-base2")}


def studies() -> list[tuple[str, str, Setting]]:
    """(task, name of the setting, setting) of every small study."""
    again = [("sst2", name, CLAIMS[name]._replace(methods=methods)) for name, methods in REPEATED.items()]
    return [*(("trec6", name, setting) for name, setting in CLAIMS.items()), *again]


class Cell(NamedTuple):
    """One run. `setting`: what differs from the task's usual data and graph, by its name in CLAIMS; lr: the
    rate of A, ratio: of B to it.
    """

    phase: str
    task: str
    method: str
    p: float
    seed: int
    lr: float
    ratio: float
    rounds: int = ROUNDS
    setting: str = ""

    @property
    def name(self) -> str:
        parts = [self.task, self.method, *([self.setting] if self.setting else []), f"p{self.p:g}", f"s{self.seed}"]
        return "-".join([*parts, *([f"lr{self.lr:g}", f"B{self.ratio:g}"] if self.phase == "rates" else [])])

    @property
    def tested(self) -> bool:
        """Cells that choose a rate never see the test file."""
        return self.phase != "rates"

    def overrides(self) -> dict[str, Any]:
        """What the recipe of the task is given beside its own fields."""
        entry = METHODS[self.method]
        setting = CLAIMS[self.setting].overrides if self.setting else {}
        graph = {} if "topology" in entry.overrides else {"topology.p": self.p}
        return {METHOD_FIELD: {"name": entry.name, **entry.params}, **graph, "seed": self.seed,
                "train.rounds": self.rounds, "train.lr": self.lr, "train.lr_ratio.B": self.ratio,
                **REGIME, **setting, **entry.overrides}


Found = Mapping[str, dict]


def plan(found: Found, phases: tuple[str, ...] = ()) -> Iterator[Cell]:
    """The cells that can be run with what has been found, in their order, those that are done among them."""
    for name, cells in PHASES.items():
        if not phases or name in phases:
            yield from cells(found)


def rates(found: Found, task: str, method: str) -> tuple[float, float] | None:
    """The rates of a method, or of the one whose rates it takes; None while the search is not done."""
    return findings.search(scores(found, task, METHODS[method].rates or method)).chosen


def scores(found: Found, task: str, method: str) -> dict[tuple[float, float], float]:
    """Validation accuracy by (rate of A, ratio) of the cells that choose a method's rates."""
    return {(cell["lr"], cell["ratio"]): findings.validation(cell) for cell in found.values()
            if (cell["phase"], cell["task"], cell["method"]) == ("rates", task, method)}


def _rates(found: Found, task: str, methods) -> Iterator[Cell]:
    for method in methods:
        if METHODS[method].rates is None:
            for lr, ratio in findings.search(scores(found, task, method)).points:
                yield Cell("rates", task, method, P_RATES, SEED_RATES, lr, ratio, ROUNDS_RATES)


def _cells(found: Found, phase: str, task: str, methods, probabilities, seeds, rounds: int = ROUNDS,
           setting: str = "") -> Iterator[Cell]:
    """Seed by seed, so that whole sets of pairs come first."""
    for seed in seeds:
        for p in probabilities:
            for method in methods:
                chosen = rates(found, task, method)
                if chosen is not None:
                    yield Cell(phase, task, method, p, seed, *chosen, rounds, setting)


def _core(found: Found, task: str, seeds) -> Iterator[Cell]:
    yield from _rates(found, task, CORE)
    yield from _cells(found, "main", task, CORE, (0.02, 0.1), seeds)


def _sst2(found: Found) -> Iterator[Cell]:
    yield from _core(found, "sst2", range(SEEDS))
    yield from _cells(found, "main", "sst2", ("lora", "tad15"), (0.02,), range(SEEDS, MOST_SEEDS))


def _rest(found: Found) -> Iterator[Cell]:
    for task in TASKS:
        yield from _rates(found, task, OTHERS)
        yield from _cells(found, "main", task, CORE, (0.02, 0.1, 0.5), range(SEEDS))
        yield from _cells(found, "main", task, (*OTHERS, "local"), (0.02, 0.1, 0.5), range(SEEDS))


def _claims(found: Found) -> Iterator[Cell]:
    for task, name, setting in studies():
        yield from _rates(found, task, setting.methods)
        yield from _cells(found, "claims", task, setting.methods, (P_CLAIMS,), range(setting.seeds), setting.rounds, name)


PHASES = {
    "core": lambda found: _core(found, "trec6", range(2)),
    "deciding": lambda found: _cells(found, "main", "trec6", DECIDING, (0.02,), range(2, MOST_SEEDS)),
    "ablations": lambda found: _cells(found, "ablations", "trec6", ABLATIONS, (0.02,), range(SEEDS)),
    "sst2": _sst2,
    "rest": _rest,
    "claims": _claims,
}
