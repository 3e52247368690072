"""`dfl plan`: from a recipe, a network and a target to a ranking of combinations, in a folder of its own."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfl.config import Config, resolve
from dfl.config.recipes import parse_overrides, read_yaml
from dfl.plan import table
from dfl.plan.ask import Ask
from dfl.plan.candidates import Combination, combine, read_axes, total_steps
from dfl.plan.predict import Seen, predicted
from dfl.run import build
from dfl.run.description import describe_run
from dfl.run.runtime import place_from_environment
from dfl.store.records import finite
from dfl.training.base import DivergenceError

NAME = "plan.json"
_SHARE = 0.25  # of the rounds of a recipe, in a probe
_LEAST, _FEWEST = 8, 3


def write_plan(recipe: Path, overrides: Sequence[str], ask: Ask, output: Path | None = None, *, overwrite: bool = False,
               say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Plan, and write plan.json and plan.md into `output` (the recipe's own output with -plan at its end).

    ValueError for what does not fit together, names what; nothing is trained before that.
    """
    ask.check()
    if place_from_environment().size > 1:
        raise ValueError("a plan is made in one process; allowed: without torchrun and srun")
    tree, pairs = read_yaml(recipe), parse_overrides(list(overrides))
    config = _with_metric(tree, pairs, ask.metric)
    folder = output or Path(f"{config.output}-plan")
    _refuse(folder, overwrite)
    found = {"recipe": str(recipe), "overrides": list(overrides), **_plan(config, tree, pairs, ask, say)}
    for one in found["combinations"]:
        one["command"] = _command(recipe, overrides, one, ask)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(finite(found), indent=1, allow_nan=False) + "\n")
    (folder / "plan.md").write_text(table.markdown(found))
    return found


def _with_metric(tree: dict[str, Any], pairs: list[tuple[str, Any]], metric: str | None) -> Config:
    """The recipe's configuration. ValueError for a metric that it does not evaluate."""
    if metric is not None:
        pairs.append(("eval.primary", metric))
    config = resolve(tree, pairs)
    try:
        build.check(config)
    except ValueError as error:
        raise ValueError(str(error).replace("eval.primary", "--metric")) from None
    return config


def _refuse(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {str(folder)!r} is a file; allowed: a folder")
    if (folder / NAME).exists() and not overwrite:
        raise ValueError(f"--output {str(folder)!r} already holds a plan; allowed: another folder, or --overwrite")


def _plan(config: Config, tree: dict[str, Any], pairs: list[tuple[str, Any]], ask: Ask, say: Callable[[str], None]) -> dict[str, Any]:
    axes, steps = read_axes(config, ask.given), total_steps(config)
    candidates = combine(tree, pairs, axes, {"network": ask.network(ask.step_seconds or 0.0)}, steps)
    groups: dict[str, list[Combination]] = {}
    for one in candidates.combinations:
        groups.setdefault(one.trained, []).append(one)
    refused, lines, probes, examples = candidates.refused, [], [], build.read_examples(config)
    for group in groups.values():
        rounds = _probe_rounds(config, group[0].config, ask.probe)
        say(f"{rounds} rounds of {_trained(group[0])}, for {len(group)} combinations")
        try:
            facts, of_group = _group(group, _like_the_recipe(group, config), rounds, examples, ask, steps, refused)
        except DivergenceError as error:
            refused[f"{_trained(group[0])}: {error}"] += len(group)
            continue
        probes.append(facts)
        lines += of_group
    if not lines:
        raise ValueError(f"none of the combinations is possible: {next(iter(refused))}")
    metric, higher = probes[0]["metric"], probes[0]["better"]
    return {**describe_run(config.to_dict(), {}), "metric": metric, "better": higher, "target": ask.target, "by": ask.by,
            "bandwidth_mbit": ask.bandwidth, "latency_ms": ask.latency, "recipe_steps": steps, "probes": probes,
            "left_out": [{"reason": reason, "combinations": num} for reason, num in refused.most_common()],
            "combinations": ranked(lines, ask.by)}


def _group(group: list[Combination], like: Config, rounds: int, examples: build.Examples, ask: Ask, steps: int,
           refused: Counter[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The probe of combinations that train alike, and what is said of each. Nothing of the probe's model is left behind."""
    seen = Seen(like, rounds, examples, ask)
    return seen.facts(), list(predicted(group, seen, steps, refused))


def _trained(one: Combination) -> str:
    return f"method {table.text(one.fields['method'])} at {one.fields['train.local_steps']} local steps a round"


def _probe_rounds(recipe: Config, config: Config, given: int | None) -> int:
    """As many local steps at every interval; not fewer rounds than a curve needs, also where a run has fewer."""
    asked = given or max(_LEAST, math.ceil(_SHARE * recipe.train.rounds))
    steps = asked * (recipe.train.local_steps or 1)
    return max(_FEWEST, math.ceil(steps / (config.train.local_steps or 1)))


def _like_the_recipe(group: list[Combination], recipe: Config) -> Config:
    """Of a group, what differs least from the recipe."""
    return next((one.config for one in group if one.config.topology == recipe.topology), group[0].config)


def ranked(lines: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The best first; what does not reach the target stands at the end, the closest first."""
    sign = 1 if any(math.isinf(line["seconds"]) for line in lines) else 0
    order = sorted(lines, key=lambda line: (line[by], -sign * line["best"]))
    return [{"rank": place, **line} for place, line in enumerate(order, 1)]


def _command(recipe: Path, overrides: Sequence[str], line: dict[str, Any], ask: Ask) -> str:
    """What runs a combination on the simulated network."""
    rounds = line["train.rounds"] if math.isinf(line["rounds"]) else max(line["train.rounds"], int(line["rounds_high"])
                                                                         if math.isfinite(line["rounds_high"]) else 0)
    fields = {**line["fields"], "train.rounds": rounds, "network": line["network"]}
    words = ["dfl", "train", str(recipe), *overrides]
    for field, value in fields.items():
        words += [f"--{field}", table.text(value)]
    return shlex.join(words)
