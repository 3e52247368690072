"""One peer of a script at work: what comes before and behind each step of its optimiser, and the rounds of gossip between them.

The heart is the one of `dfl train`: `dfl.engine.gossip.Gossip` over one row. The loop, the data, the optimiser and the schedule of
the learning rate are the script's; `dfl.script.loop` and `dfl.hf` say when a step is done.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfl.adapters.ranks import Ranks
from dfl.config import Config, from_dict
from dfl.engine import state as trees
from dfl.engine.gossip import Gossip
from dfl.methods import Context
from dfl.run.build import check_adapter
from dfl.run.loop import Pending, Run, finish_round, record_sums
from dfl.script import adapters
from dfl.script.adapters import Found, Parameter, lent, parameters_of
from dfl.script.joining import Peer
from dfl.script.moments import Kept, Moments
from dfl.script.records import Records, evaluation_record
from dfl.script.rows import ScriptPeer
from dfl.script.settings import build_method, check_able
from dfl.script.sharding import check_parts
from dfl.slots import Plan
from dfl.store.records import finite
from dfl.training.base import AfterStep, DivergenceError, all_finite
from dfl.training.masks import stretch
from dfl.transport.handshake import check_settings, model_digest
from dfl.transport.shards import mine, part_like

# what the peers tell each other before a round, of which the largest counts: all are done; none trains on, and one has steps that
# it has not mixed; somebody trains on; peer _DIVERGED + its id is not finite
_DONE, _LEFT, _TRAINS, _DIVERGED = 0, 1, 2, 3
STATE_VERSION = 1


class Mixing:
    """The gossip of one peer with `model` and `optimizer`, which are the script's.

    rounds: how many there will be, for methods that plan by it; None: nobody knows, and train.rounds stands for it.
    state: goes on from what `state` gave. examples: how many the peer trains on, for the pages.
    All peers make theirs together. ValueError, on all of them, for what cannot be mixed.
    """

    def __init__(self, peer: Peer, model: nn.Module, optimizer: torch.optim.Optimizer, *, rounds: int | None = None,
                 facts: Mapping[str, Any] = {}, state: Mapping[str, Any] | None = None, output: str | None = None,
                 examples: int | None = None):
        self.peer, self.every = peer, peer.config.train.local_steps
        found = adapters.find(model)
        adapted, config = self._meet(peer, found, rounds, state)
        self.parameters: list[Parameter] = parameters_of(adapted)
        check_parts(self.parameters, getattr(optimizer, "optimizer", optimizer), peer.members)
        device = adapted.sites[0].a.device
        self.moments = Moments(getattr(optimizer, "optimizer", optimizer), self.parameters, adapted.layout)
        self.row = ScriptPeer(peer.rank, adapted, self.parameters, self.moments, config, device)
        self.config, transport = config, peer.transport
        transport.device = device  # type: ignore[attr-defined]
        self.row.read()
        if state is None:
            self._common_start()
        context = Context(adapted.layout, config.lora.head, adapted.ranks.unequal, peer.size, adapted.ranks.largest, None,
                          peer.topology, config.train.rounds)
        method = build_method(config, context)
        check_able(config, method, peer.topology)
        check_adapter(config, method, adapted.ranks)
        transport.lend(self.row.x)
        gossip = Gossip(method, adapted.layout, peer.topology, transport, [peer.rank], self.row.x, seed=config.seed,
                        scale=self._scale())
        rest: Any = None  # the loop, the data and the evaluation are the script's
        hosted: Any = self.row
        self.run = Run(config, hosted, gossip, peer.topology, transport, rest, rest, rest, rest)
        self.steps, self.started = 0, time.perf_counter()
        self.losses: list[float] = []
        self._ended: list[float] = []  # of the round that the last mix has ended
        self.evaluations: dict[str, float] = {}
        self._kept: Kept = {}
        self._begun: Tensor | None = None  # the row before the round, where the plan stretches what the round changes
        self._trained: Plan | None = None
        self._hooks = [self._drop_untrained(one) for one in self.parameters]
        resumed = state is not None
        if state is not None:
            self._load(state)
        told = [json.loads(data) for data in transport.share(json.dumps([examples, bool(output)]).encode())]
        counts, self._recorded = [count for count, _ in told], any(kept for _, kept in told)
        facts = dict(facts) if None in counts else {"shards": {"examples": counts, "classes": None}} | dict(facts)
        self._output = output
        if not self._recorded:  # nobody would see it
            self.run.config = from_dict(config.to_dict() | {"measure": {"every": 0, "layers": 0}})
        # of several processes of a peer the first alone writes
        self.records = Records(self.run, peer, found, facts, output if peer.speaks else None, resumed=resumed)
        self._begin_round(new=not resumed)
        if peer.speaks and peer.rank == 0:
            print(self._about(resumed), file=sys.stderr, flush=True)

    # meeting

    def _meet(self, peer: Peer, found: Found, rounds: int | None, state: Mapping[str, Any] | None):
        """The ranks of all peers, and the configuration with what the models tell. ValueError where they do not belong together."""
        told = [json.loads(data) for data in peer.transport.share(json.dumps([found.rank, found.scaling, rounds]).encode())]
        ranks = Ranks(tuple(rank for rank, _, _ in told), tuple(scaling for _, scaling, _ in told))
        check_settings(peer.transport, {**found.told(), "base model": self._digest(found),
                                        "mixes so far": (state or {}).get("completed", 0)})
        known = max((count for _, _, count in told if count is not None), default=None)
        return adapters.adapt(found, ranks), _with_model(peer.config, found, ranks, known)

    @staticmethod
    def _digest(found: Found) -> str:
        return model_digest(found.model, without={id(p) for _, _, _, p in found.others})

    def _scale(self) -> Tensor | None:
        return None if self.row.scale is None else torch.tensor(self.row.scale)

    def _common_start(self) -> None:
        """All start where the first peer of the largest rank does, each up to its own rank."""
        ranks = self.row.adapted.ranks
        x = self.row.x if self.peer.rank == ranks.ranks.index(ranks.largest) else torch.zeros_like(self.row.x)
        self.row.x[0] = self.peer.transport.total(x.cpu()).to(self.row.x)
        self.row.write()
        self.row.x.zero_()  # what lies beyond the own rank
        self.row.read()

    def _about(self, resumed: bool) -> str:
        """The line of a start: a script that its launcher has started alone otherwise looks like one that mixes."""
        method, topology, steps = self.config.method.name, self.config.topology.name, f"{self.every} optimiser steps"
        who = f"{self.peer.size} peers, method {method}, topology {topology}, a mix every {steps}"
        if self.peer.size == 1:
            who = ("1 peer, which has nobody to mix with (torchrun --nproc-per-node 4 ... starts four); "
                   f"method {method}, rounds of {steps}")
        later = f"; goes on after {self.completed} rounds" if resumed else ""
        return f"dfl: {who}; {f'run folder {self._output}' if self._output else 'no run folder'}{later}"

    # a round

    @property
    def completed(self) -> int:
        """Rounds that are done."""
        return self.run.completed

    @property
    def plan(self) -> Plan:
        return self.run.gossip.plans(self.completed)[0]

    def _begin_round(self, new: bool = True) -> None:
        """What trains in the round that begins, or goes on after a stop."""
        self.row.num_steps, plan, train = self.every, self.plan, self.config.train
        if new:
            self.started = time.perf_counter()
            before = self._trained.trains if self._trained is not None else frozenset[str]()
            if train.state == "fresh":
                self.moments.reset(self.row.layout.groups)
            elif train.at_switch == "fresh" and self._trained is not None:
                self.moments.reset(plan.trains - before)
            self._kept = {} if plan.mask is None else self.moments.keep()
        self._trained = plan
        self._out = None if plan.mask is None else ~plan.mask.to(self.row.x.device)
        if plan.mask is not None or plan.stretch is not None:
            self.row.read()
        self._held = self.row.x[0].clone() if plan.mask is not None else None
        if new:
            self._begun = self.row.x[0].clone() if plan.stretch is not None else None
        self._after_step: AfterStep | None = self.run.gossip.after_step(self.completed, **self._told())
        self.prepare()

    def prepare(self) -> None:
        """What does not train in this round asks for no gradient."""
        trains = self.plan.trains
        self.row.put_away()
        for one in self.parameters:
            one.parameter.requires_grad_(one.group in trains)
            if one.group not in trains:
                one.parameter.grad = None

    def _told(self) -> dict[str, Any]:
        return {"lr": self.row.learning_rate(0), "rates": self.row.rates(0), "local_steps": [self.row.num_steps]}

    def _drop_untrained(self, one: Parameter):
        """Gradients that the plan has no use for go as they come, whoever has asked for them: PEFT turns all factors on again where a
        trainer has switched the adapter off for a while."""
        trained = one.parameter.requires_grad
        one.parameter.requires_grad_(True)

        def behind(parameter: Tensor) -> None:
            if one.group not in self.plan.trains:
                parameter.grad = None
            elif self._out is not None:
                mine(parameter.grad).masked_fill_(part_like(one.of(self._out), parameter), 0)

        handle = one.parameter.register_post_accumulate_grad_hook(behind)
        one.parameter.requires_grad_(trained)
        return handle

    def before_step(self) -> None:
        """What the rule adds to the gradients, right before the optimiser uses them."""
        correction = self.run.gossip.corrections()[0]
        if correction is None:
            return
        for one in self.parameters:
            grad = one.parameter.grad
            if grad is not None:
                part = one.of(correction)
                part = part if self._out is None else part.masked_fill(one.of(self._out), 0)
                mine(grad).add_(part_like(part.to(grad.dtype), grad))

    def after_step(self, last: bool = False) -> bool:
        """Behind a step of the optimiser: what the rule makes of it, and a mix where that is due, or where it was the last step.
        Whether there was one."""
        if self._after_step is not None or self._held is not None:
            self._change_row()
        self.steps += 1
        if self.steps < self.every and not last:
            return False
        return self.mix()

    def _change_row(self) -> None:
        self.row.read()
        x = self.row.x[0]
        if self._after_step is not None:
            changed = self._after_step(0, x, self.steps)
            for cut in self.row.layout.columns(self.plan.trains):
                x[cut] = changed[cut]
        if self._held is not None:
            torch.where(self._out, self._held, x, out=x)
        self.row.write()

    # mixing

    def mix(self, training: bool = True, keep: bool = False) -> bool:
        """One round of gossip with the others; False, with nothing done, once all have ended their training.

        training: whether this peer trains on; keep: its parameters stay as they are, the others get its message. DivergenceError on
        all peers where the factors of one are not finite; ConnectionError where one is gone.
        """
        self.row.read()
        self.peer.transport.round = self.completed
        status = _TRAINS if training else _LEFT if self.steps else _DONE
        if not all_finite(self.row.x):
            status = _DIVERGED + self.peer.rank
        agreed = self._agree(status)
        if agreed == _DONE:
            return False
        self._one_round(keep)
        return True

    def _agree(self, status: int) -> int:
        """The largest status of all peers; the last round is recorded, with what was evaluated and logged since. One step of all
        peers tells both."""
        run = self.run
        mine = torch.tensor([float(status), float(bool(self.evaluations))], dtype=torch.float64).expand(3, -1)
        unseen = run.pending is None or not self._recorded
        sums = mine.new_empty(3, 0) if unseen else record_sums(run, run.pending)
        told = self.peer.transport.summary(torch.cat([mine, sums], 1))
        agreed, evaluated = map(int, told[2, :2].tolist())
        if agreed >= _DIVERGED:
            raise DivergenceError(f"peer {agreed - _DIVERGED} diverged in round {self.completed + 1}: its factors are not finite; a "
                                  "smaller learning rate or a smaller gradient norm may help", agreed - _DIVERGED)
        found = evaluation_record(self.evaluations, self.peer) if evaluated and self.peer.speaks else None
        self.records.round(run, told[:, 2:], found)
        self.evaluations = {}
        return agreed

    def _one_round(self, keep: bool) -> None:
        if self._out is not None:
            self.moments.put_back(self._out, self._kept)
        own = self.row.x.clone() if keep else None
        if self._begun is not None:
            stretch(self.row.x[0], self._begun, self.plan.stretch)
        self.row.num_steps = self.steps
        losses = torch.tensor([sum(self.losses) / len(self.losses) if self.losses else math.nan])
        self.run.pending = finish_round(self.run, self.completed, losses, time.perf_counter() - self.started)
        if own is not None:
            self.row.x.copy_(own)
        self.peer.same(self.row.x)
        self.row.write()
        self.run.completed, self.steps = self.completed + 1, 0
        self._ended, self.losses = self.losses, []
        self._begin_round()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """What the script has found of its peer's mixed model: for the record of the last round."""
        self.evaluations |= {name: float(value) for name, value in metrics.items()}

    def logged(self, loss: float) -> None:
        """A training loss of the round at work; right behind a mix, before another step, of the round that it has ended."""
        if self.steps == 0 and self.run.pending is not None:
            self._ended.append(float(loss))
            self.run.pending.table[0, 0] = sum(self._ended) / len(self._ended)
        else:
            self.losses.append(float(loss))

    def finish(self, keep: bool = False) -> None:
        """The script's training is over: mix on with those that still train until all are done, then record and save together.

        Afterwards all parameters that the script trains can be trained again. keep: as of `mix`.
        """
        while self.mix(training=False, keep=keep):
            pass
        self.row.read()
        if self._output:
            self.run.consensus()  # which all make together
        with lent(self.row.adapted, self.parameters) as adapted:
            self.records.save(self.run, adapted, self.state_tensors())
        self.release()

    def release(self) -> None:
        """Let the model be the script's alone again."""
        for handle in self._hooks:
            handle.remove()
        for one in self.parameters:
            one.parameter.requires_grad_(True)
        self.records.close()

    def fail(self, error: BaseException) -> None:
        """The script has failed: the others are told, and then the files are closed and the folder is free."""
        self.peer.leave(error)
        self.release()

    # state

    def state_tensors(self) -> dict[str, Tensor]:
        """What the slots remember, by `slot.peer.name`."""
        return trees.flatten(self.run.gossip.state)

    def state(self) -> dict[str, Any]:
        """All that goes on after a stop needs beside the model and the optimiser, which the script saves itself: plain values, and
        copies of tensors."""
        self.row.read()
        kept = {f"kept.{k}.{key}": value for (k, key), value in self._kept.items()}
        pending = self.run.pending
        kept |= {} if pending is None else {"pending": pending.table}
        kept |= {} if self._begun is None else {"begun": self._begun}
        about = None if pending is None else [finite(pending.found), pending.measure_seconds]
        tensors = {"row": self.row.x[0], **{f"slot.{name}": value for name, value in self.state_tensors().items()}, **kept}
        return {"version": STATE_VERSION, "peer": self.peer.rank, "peers": self.peer.size, "completed": self.completed,
                "steps": self.steps, "losses": list(self.losses), "run": self.records.run_id,
                "evaluations": dict(self.evaluations), "pending": about,
                "tensors": {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        """ValueError for a state of another peer or another version."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"the state of gossip has version {state.get('version')!r}; allowed: {STATE_VERSION}")
        for name, here in (("peer", self.peer.rank), ("peers", self.peer.size)):
            if state[name] != here:
                raise ValueError(f"the state of gossip is of {name} {state[name]}, and this is {name} {here}; each peer goes on from "
                                 "its own")
        tensors = {name: value.to(self.row.device) for name, value in state["tensors"].items()}
        self.row.x[0] = tensors["row"]
        self.row.write()
        slots = {name.removeprefix("slot."): value for name, value in tensors.items() if name.startswith("slot.")}
        self.run.gossip.restore(trees.unflatten(slots))
        self._kept = {(int(k), key): value for name, value in tensors.items() if name.startswith("kept.")
                      for _, k, key in [name.split(".", 2)]}
        self._begun = tensors.get("begun")
        self.run.completed, self.steps, self.losses = int(state["completed"]), int(state["steps"]), list(state["losses"])
        self.evaluations = dict(state["evaluations"])
        if state["pending"] is not None:
            self.run.pending = Pending(state["tensors"]["pending"], *state["pending"])
        self.run.resumed, self.started = True, time.perf_counter()


def _with_model(config: Config, found: Found, ranks: Ranks, rounds: int | None) -> Config:
    """The configuration with what the script's model says of itself, for the run's folder."""
    base = getattr(getattr(found.model, "config", None), "_name_or_path", "") or type(found.model).__name__
    tree = config.to_dict()
    head = tree["lora"]["head"] if tree["lora"]["head"] != "frozen" else "mixed"
    same = len(set(zip(ranks.ranks, ranks.scalings, strict=True))) == 1
    alphas = [rank * scaling for rank, scaling in zip(ranks.ranks, ranks.scalings, strict=True)]
    tree["lora"] |= {"adapter": found.kind, "rank": ranks.ranks[0] if same else list(ranks.ranks), "rslora": False,
                     "alpha": alphas[0] if same else alphas, "head": head if found.others else "frozen",
                     "targets": sorted({name.rpartition(".")[2] for name, _ in found.layers})}
    tree["model"] |= {"name": base, "task": _task(found.model)}
    positions = getattr(getattr(found.model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:  # what reads the folder prepares texts for the model
        tree["data"]["max_length"] = min(tree["data"]["max_length"], positions)
    tree["train"] |= {} if rounds is None else {"rounds": rounds}
    return from_dict(tree)


def _task(model: nn.Module) -> str:
    """By what PEFT was told, or what the architecture is called; a language model where neither says."""
    known = getattr(getattr(model, "peft_config", {}).get("default"), "task_type", None)
    base: Any = model
    name = type(base.get_base_model() if hasattr(base, "get_base_model") else base).__name__
    if str(known).endswith("SEQ_CLS") or name.endswith("ForSequenceClassification"):
        return "sequence_classification"
    return "image_classification" if name.endswith("ForImageClassification") else "causal_lm"
