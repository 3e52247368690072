"""Names of transformers' TrainingArguments and of PEFT's LoraConfig, accepted where they mean the same as a name of ours.

They stand where their users put them: the first at the top of a recipe, the second under `lora`. The resolved configuration
knows our names only. What a recipe says is translated before an override is applied, so that either name overrides the other;
one source that gives both is refused. A name whose meaning cannot be had here is refused with the reason.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from dfl.config.foreign import FOREIGN
from dfl.config.optimizers import OPTIMIZERS, SCHEDULES
from dfl.config.recipes import number, set_field
from dfl.config.schema import Config, TrainConfig, section_of
from dfl.config.trackers import TRACKERS, check_trackers

# so many fields are named to whoever knows none of them
_FEW = 8


def _same(name: str, value: Any) -> Any:
    return value


def _choice(table: Mapping[Any, Any]) -> Callable[[str, Any], Any]:
    def convert(name: str, value: Any) -> Any:
        if not isinstance(value, (str, bool)) or value not in table:
            raise ValueError(f"{name} = {value!r} has no counterpart here; allowed: {', '.join(map(str, table))}")
        return table[value]
    return convert


def _clip(name: str, value: Any) -> Any:
    """transformers does not clip at 0."""
    return None if number(value) == 0 and value is not False else value


def _warmup(name: str, value: Any) -> Any:
    value = number(value)
    if isinstance(value, (int, float)) and not 0 <= value < 1:
        raise ValueError(f"{name} = {value!r}: the warm-up is a fraction of the run here; allowed: a number from 0 up to, not "
                         "including, 1, in warmup_ratio or train.warmup")
    return value


class Alias(NamedTuple):
    """Our dotted name, how a value of theirs becomes one of ours (ValueError where it cannot), and which half of a pair it is."""

    own: str
    convert: Callable[[str, Any], Any] = _same
    half: int | None = None


_SCHEDULES = {name: name for name in SCHEDULES} | {"constant_with_warmup": "constant"}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit", "lion_32bit": "lion",
               "paged_adamw_32bit": "paged_adamw", "paged_lion_32bit": "paged_lion"} | {name: name for name in OPTIMIZERS}

ALIASES = {
    "output_dir": Alias("output"),
    "learning_rate": Alias("train.lr"),
    "per_device_train_batch_size": Alias("train.batch_size"),  # a peer is the device: each takes batches of this size
    "per_device_eval_batch_size": Alias("eval.batch_size"),
    "gradient_accumulation_steps": Alias("train.accumulation"),
    "max_grad_norm": Alias("train.clip", _clip),
    "loraplus_lr_ratio": Alias("train.lr_ratio.B"),  # of PEFT's create_loraplus_optimizer
    "weight_decay": Alias("train.weight_decay"),
    "adam_beta1": Alias("train.betas", half=0),
    "adam_beta2": Alias("train.betas", half=1),
    "adam_epsilon": Alias("train.eps"),
    "optim": Alias("train.optimizer", _choice(_OPTIMIZERS)),
    "lr_scheduler_type": Alias("train.schedule", _choice(_SCHEDULES)),
    "warmup_ratio": Alias("train.warmup", _warmup),
    "warmup_steps": Alias("train.warmup", _warmup),  # of transformers 5, where a number below 1 is a fraction
    "bf16": Alias("train.autocast", _choice({True: "bfloat16", False: "off"})),
    "save_total_limit": Alias("checkpoint.keep"),
    "num_train_epochs": Alias("train.rounds"),
    "eval_steps": Alias("eval.every"),
    "save_steps": Alias("checkpoint.every"),
    "logging_steps": Alias("logging_steps"),
    "attn_implementation": Alias("model.attention"),
    "gradient_checkpointing": Alias("train.gradient_checkpointing"),
    "load_in_4bit": Alias("model.quantization", _choice({True: "nf4", False: None})),
    "load_in_8bit": Alias("model.quantization", _choice({True: "int8", False: None})),
    "early_stopping_patience": Alias("eval.patience"),
    "early_stopping_threshold": Alias("eval.min_delta"),
    "lora.r": Alias("lora.rank"),
    "lora.lora_alpha": Alias("lora.alpha"),
    "lora.lora_dropout": Alias("lora.dropout"),
    "lora.target_modules": Alias("lora.targets"),
    "lora.use_rslora": Alias("lora.rslora"),
}
# they depend on how many steps or passes a round has, and become ours when the whole tree is known
_LATER = ("num_train_epochs", "eval_steps", "save_steps", "logging_steps")

REFUSED = {
    "max_steps": "a run is train.rounds rounds of train.local_steps steps; give these two",
    "fp16": "training in float16 needs loss scaling, which is not done here; give bf16, or model.dtype for the frozen base alone",
    "eval_strategy": "give eval.every in rounds (0: only before the first and after the last)",
    "save_strategy": "give checkpoint.minutes (null: only at the end), or checkpoint.every in rounds",
    "logging_strategy": "every round is recorded",
    "load_best_model_at_end": "a run keeps its last checkpoints; checkpoint.every and checkpoint.keep keep more of them",
    "lora.modules_to_save": "lora.head says what becomes of a new head: frozen, mixed or local",
    "lora.task_type": "give model.task",
    "lora.revision": "give model.revision, of the base model",
}
# with these values they ask for nothing
_IDLE = {"max_steps": -1, "fp16": False, "load_best_model_at_end": False}


def own_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with our names; what depends on the length of a round stays until `settle`.

    ValueError where a field is given under two names, or has no counterpart.
    """
    named, pairs = dict(tree), []
    lora = named.get("lora")
    if isinstance(lora, Mapping):
        pairs = [(f"lora.{key}", value) for key, value in lora.items() if _is_theirs(f"lora.{key}")]
        named["lora"] = {key: value for key, value in lora.items() if not _is_theirs(f"lora.{key}")}
    pairs += [(key, named.pop(key)) for key in tree if _is_theirs(key)]
    for key, value in pairs:
        own = ALIASES[key].own if key in ALIASES else None
        *sections, last = (own or "").split(".")
        inside: Any = named
        for section in sections:
            inside = inside.get(section) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and last in inside:
            raise _both(key, value, own or "", inside[last])
    return apply(named, pairs)


def _is_theirs(key: Any) -> bool:
    return key in ALIASES or key in REFUSED or key == "report_to"


def apply(tree: dict[str, Any], pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree with overrides under either name; of one name the last wins. ValueError as in `own_names`."""
    said: dict[tuple, tuple[str, Any]] = {}
    for key, value in pairs:
        if key in REFUSED:
            if key in _IDLE and value == _IDLE[key]:
                continue
            raise ValueError(f"{key} = {value!r} cannot be had: {REFUSED[key]}")
        alias = ALIASES.get(key, Alias(key))
        for half in {alias.half, None} if alias.half is not None else (None, 0, 1):
            other, before = said.get((alias.own, half), (key, None))
            if other != key:
                raise _both(key, value, other, before)
        said[alias.own, alias.half] = key, value
        _put(tree, key, alias, _value(key, alias, value))
    return tree


def _both(key: str, value: Any, other: str, before: Any) -> ValueError:
    return ValueError(f"{key} = {value!r} and {other} = {before!r} are both given and are the same field; give one of them")


def _value(key: str, alias: Alias, value: Any) -> Any:
    if key == "report_to":
        return _trackers(value)
    if key == "lora" and isinstance(value, Mapping):
        return own_names({"lora": value})["lora"]
    return alias.convert(key, value)


def _trackers(value: Any) -> Any:
    """transformers' `none` and `all`: no tracker, and every one that is installed."""
    if value in ("none", ["none"], None):
        return []
    if value not in ("all", ["all"]):
        return value
    found = []
    for name in (name for name in TRACKERS if name != "none"):
        try:
            check_trackers([name])
        except ValueError:
            continue
        found.append(name)
    return found


def _put(tree: dict[str, Any], key: str, alias: Alias, value: Any) -> None:
    if key in _LATER:
        section, _, last = alias.own.partition(".")
        if isinstance(tree.get(section), Mapping):  # it holds instead of what stood under our name
            tree[section] = {name: other for name, other in tree[section].items() if name != last}
        tree[key] = value
        return
    for name in _LATER:  # what is given later, by itself or with its whole section, holds
        if f"{ALIASES[name].own}.".startswith(f"{alias.own}."):
            tree.pop(name, None)
    if alias.half is None:
        set_field(tree, alias.own, value)
        return
    given, default = tree.get("train"), TrainConfig.model_fields
    betas = list((isinstance(given, Mapping) and given.get("betas")) or default["betas"].default)
    set_field(tree, alias.own, [value if half == alias.half else beta for half, beta in enumerate(betas)])


def settle(tree: dict[str, Any]) -> dict[str, Any]:
    """The whole tree with passes and optimiser steps as rounds. ValueError where they are no whole number of rounds."""
    train = tree.get("train") or {}
    given = [(name, tree.pop(name)) for name in _LATER if name in tree]
    if not isinstance(train, Mapping):
        return tree
    steps, passes = (train.get(name, TrainConfig.model_fields[name].default) for name in ("local_steps", "local_epochs"))
    for name, value in given:
        if name == "num_train_epochs":
            rounds = _rounds_of_passes(value, passes)
        elif value is None:
            continue
        else:
            rounds = _rounds_of_steps(name, value, steps)
        if name == "logging_steps":
            if rounds != 1:
                raise ValueError(f"logging_steps = {value!r}: every round is recorded, every train.local_steps = {steps} steps")
        else:
            set_field(tree, ALIASES[name].own, rounds)
    return tree


def _rounds_of_passes(value: Any, passes: Any) -> int:
    if not _is_count(passes):
        raise ValueError(f"num_train_epochs = {value!r} has no meaning for rounds of train.local_steps steps: peers hold different "
                         "numbers of examples; give train.rounds, or train.local_epochs (and train.local_steps: null)")
    if not _is_count(value) or value % passes:
        raise ValueError(f"num_train_epochs = {value!r} is not allowed; allowed: a positive multiple of train.local_epochs = {passes}")
    return value // passes


def _rounds_of_steps(name: str, value: Any, steps: Any) -> int:
    own = "" if name == "logging_steps" else f"; or give {ALIASES[name].own} in rounds"
    if not _is_count(steps):
        raise ValueError(f"{name} = {value!r} counts optimiser steps; without train.local_steps a round has no fixed number{own}")
    if not _is_count(value) or value % steps:
        raise ValueError(f"{name} = {value!r} counts optimiser steps, and things happen at the end of a round of train.local_steps = "
                         f"{steps}; allowed: a positive multiple of {steps}{own}")
    return value // steps


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def suggest(where: str, key: Any, known: Iterable[str]) -> str:
    """What to say about an unknown key of section `where`: the field that was meant, why there is none, or what is like it."""
    found = _elsewhere(key)
    if found:
        return f" (did you mean {found}?)"
    if _answer(key):
        return f": {_answer(key)}"
    known = list(known)
    prefix = f"{where}." if where else ""
    theirs = [name.removeprefix(prefix) for name in ALIASES if name.startswith(prefix) and "." not in name.removeprefix(prefix)]
    close = get_close_matches(str(key), [*known, *theirs], n=3) or get_close_matches(str(key), FOREIGN, n=1, cutoff=0.8)
    if close:
        answer = f" {FOREIGN[close[0]]}" if close[0] in FOREIGN else ""
        return f" (did you mean {_either(close)}?){answer}"
    return f"; allowed: {', '.join(known)}" if len(known) <= _FEW else "; `dfl train --dry-run` prints every field there is"


def _elsewhere(key: Any) -> str:
    """Our fields of that name in other sections, or our name for one of theirs."""
    own = [alias.own for name, alias in ALIASES.items() if key == name.rpartition(".")[2] and alias.own != name]
    sections = {name: section_of(field.annotation) for name, field in Config.model_fields.items()}
    inside = [f"{name}.{key}" for name, section in sections.items() if section is not None and key in section.model_fields]
    return _either(own[:1] or inside or ([key] if key in sections else []))


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


def _answer(key: Any) -> str | None:
    """Why a name of another trainer is no field, or which field says the same."""
    refused = [reason for name, reason in REFUSED.items() if key == name.rpartition(".")[2]]
    return refused[0] if refused else FOREIGN.get(str(key).replace("-", "_"))
