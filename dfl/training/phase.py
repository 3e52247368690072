"""The local phase of `dfl train`: every hosted peer takes its steps of a round on the one base model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.attach import Rows
from dfl.adapters.batched import uploaded
from dfl.adapters.layout import empty_rows
from dfl.seeds import derive
from dfl.slots import Plan
from dfl.training.base import AfterStep, DivergenceError, Halt, all_finite
from dfl.training.batches import Batches, Wanted
from dfl.training.dropout import PeerDropout
from dfl.training.executors import Executor, Stacked, autocasts, logit_bytes
from dfl.training.hosted import HostedPeers, Part
from dfl.training.masks import Held, stacked, stretch
from dfl.training.privacy import noise_seed, noisy_mean, sampled
from dfl.training.reference import with_reference
from dfl.training.skipped import untrained
from dfl.training.together import Together


class _Phase(NamedTuple):
    """What all steps of a phase have in common. rows: what the model reads; held: what masks leave out; masks, stretches: those of
    the plans; num_steps: of all hosted peers together."""

    t: int
    rows: Rows
    trains: frozenset[str]
    corrections: Sequence[Tensor | None]
    part: Part
    held: Held | None
    after_step: AfterStep | None
    halt: Halt | None
    masks: Sequence[Tensor | None]
    stretches: Sequence[Tensor | None]
    num_steps: int


class ModelTrainer:
    """Trains hosted peers on the examples of `split`: a `dfl.training.base.LocalTrainer`.

    Batches, dropout and what else is random follow from (seed, peer, t). A phase that `halt` has stopped goes on with
    the next call of `run`, also in another process, from what `HostedPeers.state_tensors` gave. Who gives `halt` has to
    call `HostedPeers.end_phase`: until then a phase that is done can be saved as well, as another process may have
    stopped in its own. max_length: tokens of an example at most, by which the executor decides who trains together.
    together: with the other processes of a team that holds the base model in parts.
    """

    def __init__(self, peers: HostedPeers, task: Any, split: Any, executor: Executor, max_length: int = 0,
                 together: Together | None = None):
        self.peers, self.task, self.split, self.executor, self.together = peers, task, split, executor, together
        self.row_bytes = logit_bytes(peers.adapted.model, peers.train.batch_size * max_length)
        self.batches = Batches(peers, task, split)
        self.generators = [torch.Generator(peers.device) for _ in peers.ids]

    def run(self, x: Tensor, plans: Sequence[Plan], corrections: Sequence[Tensor | None], t: int, *,
            residuals: Tensor | None = None, after_step: AfterStep | None = None, halt: Halt | None = None) -> Tensor | None:
        """As the protocol has it; x are the peers' own rows. What a mask leaves out keeps its moments as well."""
        peers, trains, masks = self.peers, plans[0].trains, [plan.mask for plan in plans]
        assert x is peers.x
        trained = stacked(masks, peers.layout.size)
        rows, part = peers.rows(residuals), peers.begin_phase(trains, trained is not None)
        # what is left out has the values of the start still
        held = None if trained is None else Held(trained, x.clone(), part.held)
        num_steps = sum(map(peers.steps, range(len(peers.ids))))
        phase = _Phase(t, rows, trains, corrections, part, held, after_step, halt, masks, [plan.stretch for plan in plans], num_steps)
        peers.adapted.model.train()
        for index in self.executor.groups(len(peers.ids), self.row_bytes):
            if not self._train(phase, index):
                self._check_finite(phase)
                return None
        if held:
            held.put_back_moments(peers.optimizer.moments(), peers.ids, peers.layout)
        peers.adapted.model.eval()
        self._check_finite(phase)
        if halt is None:
            peers.end_phase()
        return part.means

    def _train(self, phase: _Phase, index: list[int]) -> bool:
        """The steps of the rows `index`, which go through the model together; False when halted before the last."""
        peers, done = self.peers, phase.part.done
        unfinished = [row for row in index if done[row] < peers.steps(row)]
        if not unfinished:
            return True
        self._seed(phase, index)
        reads, skips = peers.adapted.reads(phase.trains), untrained(peers.adapted, phase.masks, index)
        with self.executor.bound(peers.adapted, phase.rows, peers.factors.gradients, index, reads, skips) as forward:
            # peers that come from several processes may have stopped at different steps: those behind catch up first
            for k in range(min(done[row] for row in unfinished), max(map(peers.steps, index))):
                active = [row for row in index if done[row] <= k < peers.steps(row)]
                if phase.halt and phase.halt(phase.num_steps - sum(done)):
                    self._keep_generators(phase, index)
                    self.batches.settle()
                    return False
                after = tuple(row for row in index if done[row] <= k + 1 < peers.steps(row))
                self._count(phase, k, active, self._step(phase, k, active, after, forward))
        return True

    def _count(self, phase: _Phase, k: int, active: list[int], losses: Tensor) -> None:
        self._after_step(phase, k, active)
        self._stretch(phase, [row for row in active if k == self.peers.steps(row) - 1])
        means, first = phase.part.means, phase.part.first
        places = uploaded(active, means)
        means.index_add_(0, places, losses / uploaded([self.peers.steps(row) for row in active], means))
        if k == 0:
            first.index_copy_(0, places, losses)
        for row in active:
            phase.part.done[row] = k + 1

    def _seed(self, phase: _Phase, rows: list[int]) -> None:
        """The generators for the steps of these rows: from the seed, or as they were when the rows stopped."""
        peers = self.peers
        for row in rows:
            self.generators[row].manual_seed(derive(peers.seed, "local", peers.ids[row], phase.t))
        # what draws from the global generator (stochastic depth) must not depend on the hosting either
        _seed_global(derive(peers.seed, "global", peers.ids[rows[0]], phase.t), peers.device)
        for row in rows:
            kept = phase.part.generators[row]
            if kept:
                self.generators[row].set_state(kept["own"])
                torch.set_rng_state(kept["global"])
                if "device" in kept:
                    torch.cuda.set_rng_state(kept["device"], peers.device)
            phase.part.generators[row] = {}

    def _keep_generators(self, phase: _Phase, rows: list[int]) -> None:
        device = self.peers.device
        for row in rows:
            if 0 < phase.part.done[row] < self.peers.steps(row):
                on_device = {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
                phase.part.generators[row] = {"own": self.generators[row].get_state(), "global": torch.get_rng_state(),
                                              **on_device}

    def _step(self, phase: _Phase, k: int, active: list[int], after: tuple[int, ...], forward) -> Tensor:
        """Step k of the rows `active`: their losses. after: the rows of the next one."""
        peers, train = self.peers, self.peers.train
        if train.privacy.noise is not None:
            return self._private_step(phase, k, active)
        peers.factors.zero_gradients(active)
        peers.factors.refresh()
        total = torch.zeros(len(active), device=peers.device)
        batches = self.batches.of(Wanted(phase.t, k, tuple(active)), Wanted(phase.t, k + 1, after) if after else None)
        shares = self._shares(batches, len(active))
        if self.together is not None:
            total[0] = self._step_together(phase, active[0], batches, shares, forward)
        for micro, batch in enumerate(batches if self.together is None else ()):
            batch = with_reference(self.task, peers.adapted, batch, self._autocasts)
            with self._autocast(), PeerDropout([self.generators[row] for row in active]):
                output = forward(self.task.inputs(batch), active)
            losses = self.task.losses(output, batch, len(active))
            if shares is None:
                mean, told = losses.sum() / train.accumulation, losses.detach() / train.accumulation
            else:
                mean, told = (losses * shares[micro]).sum(), losses.detach() * shares[micro]
            if losses.requires_grad:  # not where masks leave out all of it
                mean.backward()
            total += told
        peers.factors.pull_back()
        self._correct_and_clip(phase, active)
        peers.optimizer.step(phase.t, k, active, phase.trains)
        return total

    def _step_together(self, phase: _Phase, row: int, batches: list[dict[str, Tensor]], shares: Tensor | None, forward) -> Tensor:
        """The gradient of a step of one peer, of which each process of the team takes a part; the loss."""
        peers, train = self.peers, self.peers.train
        told = [1 / train.accumulation] * len(batches) if shares is None else shares[:, 0].tolist()
        return self.together.gradients(phase.rows, row, peers.factors.gradients[row], forward, batches, told, train.batch_size,
                                       self.generators[row], peers.adapted.reads(phase.trains),
                                       untrained(peers.adapted, phase.masks, [row]))

    def _private_step(self, phase: _Phase, k: int, active: list[int]) -> Tensor:
        """The same of DP-SGD: every example is a row of its own for the stacked executor, whose gradients are then one for each."""
        peers, settings, losses = self.peers, self.peers.train.privacy, torch.zeros(len(active), device=self.peers.device)
        for place, row in enumerate(active):
            number = phase.t * peers.steps(row) + k
            chosen = sampled(peers.streams[row].indices, peers.train.batch_size, derive(peers.seed, "sample", peers.ids[row], number))
            g = empty_rows(len(chosen), peers.layout.size, device=peers.device)
            if len(chosen):
                losses[place] = self._by_example(phase, row, chosen, g)
            noise = noise_seed(settings, peers.seed, peers.ids[row], number)
            peers.g[row] = noisy_mean(g, peers.layout, phase.trains, settings, peers.train.batch_size, noise, phase.masks[row])
        self._correct_and_clip(phase, active)
        peers.optimizer.step(phase.t, k, active, phase.trains)
        return losses

    def _by_example(self, phase: _Phase, row: int, chosen: np.ndarray, g: Tensor) -> Tensor:
        """The mean loss of the examples `chosen` at a peer; g (B, D): the gradient of each."""
        peers, num = self.peers, len(chosen)
        x = empty_rows(num, peers.layout.size, device=peers.device)
        x.copy_(peers.x[row].expand(num, -1))
        batch = self.task.collate([self.split.features[i] for i in chosen])
        batch = {key: value.to(peers.device) for key, value in batch.items()}
        batch = with_reference(self.task, peers.adapted, batch, self._autocasts)
        # residuals and what else is the peer's own is bound around this already
        rows = Rows(x, None, None if peers.scale is None else (peers.scale[row],) * num)
        skips = untrained(peers.adapted, phase.masks, [row])
        with Stacked().bound(peers.adapted, rows, g, range(num), phase.trains, skips) as forward:
            with self._autocast(), PeerDropout([self.generators[row]]):
                output = forward(self.task.inputs(batch), list(range(num)))
            losses = self.task.losses(output, batch, num)
            if losses.requires_grad:
                losses.sum().backward()
        return losses.detach().mean()

    def _shares(self, batches: list[dict[str, Tensor]], num_groups: int) -> Tensor | None:
        """(micro-batches, G): by how much each counts in the step of a peer, so that every token counts alike; None: all alike."""
        if len(batches) == 1 or not hasattr(self.task, "weights"):
            return None
        counted = torch.stack([self.task.weights(batch, num_groups) for batch in batches])
        return counted / counted.sum(0).clamp(min=1)

    @property
    def _autocasts(self) -> bool:
        return autocasts(self.peers.train.autocast, self.peers.device)

    def _autocast(self):
        return torch.autocast(self.peers.device.type, torch.bfloat16, enabled=self._autocasts)

    def _correct_and_clip(self, phase: _Phase, active: list[int]) -> None:
        g, clip = self.peers.g, self.peers.train.clip
        for row in active:
            if phase.corrections[row] is not None:
                g[row] += phase.corrections[row]
        if phase.held:  # what is not trained does not count for the norm
            phase.held.clear(g)
        if clip is None:
            return
        mine = g if len(active) == len(g) else g[active]
        squares = sum((mine[:, cut].square().sum(1) for cut in self.peers.layout.columns(phase.trains)), mine.new_zeros(len(mine)))
        factor = (clip / (squares.sqrt() + 1e-6)).clamp_max(1.0)
        if len(active) == len(g):
            g.mul_(factor[:, None])
        else:
            for row, value in zip(active, factor, strict=True):
                g[row].mul_(value)

    def _after_step(self, phase: _Phase, k: int, active: list[int]) -> None:
        x = self.peers.x
        for row in active if phase.after_step else ():
            changed = phase.after_step(row, x[row], k)
            for cut in self.peers.layout.columns(phase.trains):
                x[row, cut] = changed[cut]
        if phase.held:
            phase.held.put_back(x)

    def _stretch(self, phase: _Phase, done: list[int]) -> None:
        """The rows that have taken their last step, with what their plans make of the change."""
        for row in done:
            stretch(self.peers.x[row], phase.part.start[0][row], phase.stretches[row])

    def _check_finite(self, phase: _Phase) -> None:
        means, first, x = phase.part.means, phase.part.first, self.peers.x
        if not all_finite(means, x):
            bad = (~(torch.isfinite(means) & torch.isfinite(x).all(1))).nonzero().flatten().tolist()
            peer, at_start = self.peers.ids[bad[0]], not bool(torch.isfinite(first).all())
            self.peers.end_phase()
            raise DivergenceError(f"peer {peer} diverged in round {phase.t + 1}: mean training loss {float(means[bad[0]])}",
                                  peer, at_start)


def _seed_global(seed: int, device: torch.device) -> None:
    """torch.manual_seed; on the CPU without the seeds of other kinds of device, each of which keeps a trace of its caller."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
