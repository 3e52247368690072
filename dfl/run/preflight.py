"""All that a start can refuse before it reads the weights of a model: the same for `dfl train` and for its dry run."""

from functools import partial
from typing import Any, NamedTuple

import torch
import transformers

from dfl import tasks
from dfl.adapters import ranks
from dfl.adapters.attach import fit
from dfl.adapters.layout import Layout
from dfl.config import Config
from dfl.run import memory
from dfl.run.build import Examples, build_method, read_examples
from dfl.run.runtime import Place
from dfl.tasks import heads, quantized
from dfl.tasks.models import quiet
from dfl.training import executors
from dfl.transport import hosting


class Shapes(NamedTuple):
    """A model and its adapters without a number: bytes of the base model, the rows that are trained, the factors that it reads."""

    model_bytes: float
    layout: Layout
    lora: Layout
    ranks: ranks.Ranks


def ready(config: Config, topology, device: torch.device, place: Place) -> tuple[Examples, list[memory.Part] | None]:
    """The examples of a run, read and divided, and the memory of a process.

    ValueError where they, or the model's adapters, cannot be had or kept. None for a model that cannot be made without its weights.
    """
    executors.choose(config.train.executor if config.processes_per_peer == 1 else "sequential", device, config.lora.adapter)
    quantized.check_device(config.model, device)
    examples = read_examples(config)
    shapes = shapes_of(config, examples.prepared)
    return examples, None if shapes is None else _memory(config, topology, shapes, device, place)


def shapes_of(config: Config, prepared: tasks.Prepared) -> Shapes | None:
    """ValueError for adapters that do not fit the model; None for an architecture that cannot be made without its weights."""
    auto = getattr(transformers, prepared.kind.auto_class)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet():
        try:
            net = auto.from_config(prepared.config, dtype=getattr(torch, config.model.dtype),
                                   trust_remote_code=config.model.trust_remote_code)
        except Exception:  # whatever code of an architecture is not made for it; the weights are read all the same
            return None
        head = heads.modules(net, set()) if prepared.kind.auto_class != "AutoModelForCausalLM" else ()
        size = quantized.bytes_of(net, config.model)
        fitted = fit(net, config.lora, config.model.task.name, head, partial(ranks.resolve, config.lora, config.peers, config.seed))
    return Shapes(size, fitted.layout, fitted.lora, fitted.ranks)


def _memory(config: Config, topology, shapes: Shapes, device: torch.device, place: Place) -> list[memory.Part]:
    """ValueError where it does not suffice."""
    # of the process that hosts most; what a rule adds is known when it is built, which may take memory itself
    hosted = max(map(len, hosting(config.peers, place.size)))
    count = partial(memory.parts, config, hosted=hosted, row=shapes.layout.size,
                    model=shapes.model_bytes / config.processes_per_peer,
                    expanded=shapes.lora.size if shapes.layout is not shapes.lora else 0)
    available, where, sharing = room(device, place)
    memory.check(config, count(active=0, message=0), sharing, available, where)
    method = build_method(config, shapes.layout, topology, shapes.ranks)
    plan, residual = method.schedule.plan(0, 0), method.rule.residual
    found = count(active=shapes.layout.length(plan.trains), message=shapes.layout.length(plan.sends),
                  residual=residual.size if residual else 0, remote=_remote(config, topology, place))
    memory.check(config, found, sharing, available, where)
    return found


def memory_lines(parts: list[memory.Part], device: torch.device, place: Place) -> list[str]:
    """What a process needs, part by part, beside what there is."""
    available, where, sharing = room(device, place)
    return [f"memory of {'the' if place.size == 1 else 'each'} process, without the activations of a step:",
            *memory.lines(parts, available, where, sharing)]


def room(device: torch.device, place: Place) -> tuple[float, str, int]:
    """Bytes of memory where the rows lie, what has them, and how many processes share them."""
    if device.type == "cuda":
        number = torch.cuda.device_count()
        return float(torch.cuda.get_device_properties(device).total_memory), "the GPU", -(-place.local_size // number)
    return memory.limit(), "this machine", place.local_size


def _remote(config: Config, topology: Any, place: Place) -> int:
    """From how many peers of other processes messages come in the first round, for process 0."""
    here = hosting(config.peers, place.size)[0]
    if len(here) == config.peers:
        return 0
    senders: set[int] = set()
    for peer in here:
        senders.update(topology.neighbors(0, peer))
    return len(senders - set(here))
