"""The table of adapter kinds: what is trained, how the model reads it, how it is saved, and what it does not go with.

A kind is a row: declared traits and pure functions, which all rooms ask. No other module compares names of kinds, so
that a new one is a row here, or in a package of its own by the entry point `dfl.adapters` (CONTRIBUTING.md). rsLoRA is
no row: it is the scaling of any kind with an alpha (`lora.rslora`), of each peer by itself. Not here: how peers mix
what they train (`dfl.rules`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dfl.adapters.cores import Core, blocks
from dfl.adapters.peft_layers import ADAPTER, DORA, HIRA, LORA, Layer, PeftLayers
from dfl.config import LoraConfig
from dfl.plugins import lookup


class Beside(NamedTuple):
    """A tensor that every layer trains beside A and B, as group M of a row.

    shape(d_in, d_out); parameter(module) -> PEFT's; start(weight (O, I)) -> its values at first.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    parameter: Callable[[Layer], nn.Parameter]
    start: Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """An adapter: a row of `KINDS`.

    about: one line, for `dfl list`.
    layers: PEFT's layers, and what a folder of them holds.
    beside: what is trained beside A and B, None: nothing.
    core: from the section `lora` of a recipe, what is trained in place of A and B; None: they are.
    executors: what can run its layers, as train.executor names it; stacked runs plain LoRA layers alone.
    methods: those that can mix it, its own first; None: all that want no other kind.
    unfit: rules that cannot have it, each with the reason.
    residual: whether a rule may keep low-rank products beside it.
    unequal: whether peers may differ in rank and alpha.
    starts: the values of lora.start that it takes; gradient fills a core named `core`, of blocks.
    own_a: every peer has a frozen A of its own (`dfl.adapters.frames`), and trains B.
    multiplies: it multiplies the base model's weights, which may not be rounded to fewer bits then.
    """

    about: str
    layers: PeftLayers = LORA
    beside: Beside | None = None
    core: Callable[[LoraConfig], Core] | None = None
    executors: tuple[str, ...] = ("sequential", "stacked")
    methods: tuple[str, ...] | None = None
    unfit: Mapping[str, str] = {}
    residual: bool = True
    unequal: bool = False
    starts: tuple[str, ...] = ("kaiming",)
    own_a: bool = False
    multiplies: bool = False

    @property
    def trains(self) -> tuple[str, ...]:
        """The groups of a row that are trained, the head aside."""
        factors = ("core",) if self.core else ("A", "B")
        return (*factors, "M") if self.beside else factors


# the norms of the weight's rows: with B = 0 the model is the base model
_MAGNITUDES = Beside(lambda d_in, d_out: (d_out,), lambda module: module.lora_magnitude_vector[ADAPTER].weight,
                     lambda weight: weight.float().norm(dim=1))
KINDS: dict[str, Kind] = {
    "lora": Kind("Low-rank factors: W0 + s B A (Hu et al. 2021, arXiv 2106.09685).", unequal=True,
                 starts=("kaiming", "pissa", "olora")),
    "dora": Kind("LoRA with a trained magnitude for every output (Liu et al. 2024, arXiv 2402.09353).", DORA,
                 beside=_MAGNITUDES, executors=("sequential",), residual=False),
    "hira": Kind("The weight times a low-rank product, W0 ⊙ (1 + B A) (HiRA: Huang et al. 2025, ICLR).", HIRA,
                 executors=("sequential",), residual=False, multiplies=True,
                 unfit={"flora_na": "fits its coefficients to B A, but lora.adapter = 'hira' changes a weight by "
                                    "W0 ⊙ (B A); allowed with it: rule.name = 'hira', which cuts in that metric, or "
                                    "a rule that fits nothing"}),
    "sb": Kind("A core between frozen orthonormal bases: B R A (Fed-SB: Ponkshe et al. 2025, arXiv 2502.15436).",
               core=lambda lora: blocks(), methods=("fed_sb", "local"), starts=("kaiming", "gradient")),
    "ravan": Kind("Several scaled cores between frozen bases (RAVAN: Raje et al. 2025, arXiv 2506.05568).",
                  core=lambda lora: blocks(lora.heads, scaled=True), methods=("ravan", "local"),
                  starts=("kaiming", "gradient")),
    "orthogonal": Kind("A frozen A of each peer's own, orthogonal to all others (Yang et al. 2026, arXiv 2602.20492).",
                       methods=("task_bank", "local"), own_a=True),
}


def kind_of(lora: LoraConfig) -> Kind:
    """The row of lora.adapter. ValueError for a name that the table does not have."""
    return lookup("lora.adapter", KINDS, lora.adapter)


def describe() -> dict[str, str]:
    return {name: kind.about for name, kind in KINDS.items()}


def check_method(lora: LoraConfig, method: str, rule: str, who: str, rules: Mapping[str, str]) -> None:
    """ValueError for a kind that a method, or a rule in the place of its own, cannot mix.

    who: what of the recipe names the rule; rules: the own rule of every method.
    """
    kind = kind_of(lora)
    what = "cores between frozen bases" if kind.core else " and ".join(kind.trains)
    if kind.methods is not None and method not in kind.methods:
        raise ValueError(f"lora.adapter = {lora.adapter!r} trains {what}, which method.name = {method!r} does not mix; "
                         f"allowed: {', '.join(kind.methods)}")
    able = {rule} if kind.methods is None else {rules[name] for name in (kind.methods[0], method)}
    if rule not in able:
        raise ValueError(f"lora.adapter = {lora.adapter!r} trains {what}, which {who} does not mix; allowed: "
                         f"{', '.join(sorted(able))}")
    if rule in kind.unfit:
        raise ValueError(f"{who} {kind.unfit[rule]}")


def check_wanted(lora: LoraConfig, who: str, wants: str | None) -> None:
    """ValueError for another kind than the one that `who` of a recipe is for; None: it is for any."""
    if wants is not None and lora.adapter != wants:
        raise ValueError(f"{who} needs lora.adapter = {wants!r}, got {lora.adapter!r}")


def check_residual(lora: LoraConfig, who: str) -> None:
    """ValueError for a kind that has no place for the residual that the rule named by `who` keeps."""
    if not kind_of(lora).residual:
        able = [name for name, row in KINDS.items() if row.residual and row.methods is None]
        raise ValueError(f"{who} keeps a residual beside B A, which lora.adapter = {lora.adapter!r} has no place for; "
                         f"allowed: {', '.join(able)}")


def check_start(lora: LoraConfig, unequal: bool) -> None:
    """ValueError for a start that the kind does not take, and for peers of unequal ranks or alphas that it cannot have."""
    kind = kind_of(lora)
    if lora.start not in kind.starts:
        able = [repr(name) for name, row in KINDS.items() if lora.start in row.starts]
        raise ValueError(f"lora.start = {lora.start!r} is for lora.adapter = {' or '.join(able)}, got "
                         f"{lora.adapter!r}; allowed with it: {', '.join(kind.starts)}")
    if lora.start_step and lora.start != "gradient":
        raise ValueError(f"lora.start_step = {lora.start_step} is the step of lora.start = 'gradient', got "
                         f"{lora.start!r}; allowed: 0")
    if unequal and (lora.start != "kaiming" or not kind.unequal):
        what = f"lora.start = {lora.start!r}" if lora.start != "kaiming" else f"lora.adapter = {lora.adapter!r}"
        raise ValueError(f"{what} needs one lora.rank and one lora.alpha for all peers")
