"""Named methods of the literature: which rule, which schedule. A user types the name, and may still fill each slot himself."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfl.adapters.layout import Layout
from dfl.channels import CHANNELS
from dfl.codecs import CODECS
from dfl.guards import GUARDS
from dfl.networks import NETWORKS
from dfl.plugins import check_parameters, did_you_mean, first_line, lookup, parameters
from dfl.rules import RULES
from dfl.schedules import SCHEDULES
from dfl.schedules.groups import groups_of
from dfl.schedules.presence import among_present
from dfl.slots import Channel, Codec, Guard, Mixing, Network, Rule, Schedule, Trigger
from dfl.triggers import TRIGGERS
from dfl.wrappers import WRAPPERS


class Row(NamedTuple):
    """A method of the table: a rule under a schedule, with parameters that make it what it is; `adapter`: the one that it is for."""

    rule: str
    schedule: str = "both"
    fixed: Mapping[str, object] = {}
    adapter: str | None = None
    about: str | None = None  # None: the rule's own first line


ACTIVE = {"T": 1, "exchange": "active"}
METHODS: dict[str, Row] = {
    "lora": Row("average", about="Train A and B, mix A and B (Dec-LoRA, DLoRA; PS of the aggregation-broadcast analysis)."),
    "ffa": Row("average", "frozen_a", about="Freeze the shared A, train and mix B (FFA-LoRA as gossip: DLoRA-FA, ConLoRA)."),
    "share_a": Row("average", "share_a", about="Train A and B, mix A alone: every peer keeps a B of its own (FedSA-LoRA as gossip)."),
    "rolora": Row("average", "alternate", ACTIVE,
                  about="Train B and A in turn, round by round, and mix only the one trained (RoLoRA as gossip)."),
    "adf": Row("average", "alternate", about="Train B and A in turn, T rounds each, and mix both every round (ADF-LoRA)."),
    "tad": Row("average", "automatic", about="ADF with phases chosen from the topology: sparser graphs get longer ones (TAD-LoRA)."),
    "lora_a2": Row("lora_a2", "alternate", ACTIVE),
    "plora": Row("plora", "random_slots"),
    "salf": Row("salf", "stragglers"),
    "fedrot": Row("fedrot"),
    "flora_na": Row("flora_na"),
    "lora_fair": Row("lora_fair"),
    "fed_svd": Row("fed_svd", "frozen_a"),
    "decaf": Row("decaf"),
    "florist": Row("florist"),
    "fedask": Row("fedask"),
    "hetlora": Row("hetlora"),
    "replicate": Row("replicate"),
    "fedhl": Row("fedhl"),
    "carry": Row("carry"),
    "fedex": Row("fedex"),
    "fedex_choco": Row("fedex_choco"),
    "flora": Row("flora"),
    "fed_sb": Row("average", adapter="sb", about="Train and mix only the core R of B R A, with B and A frozen and common (Fed-SB)."),
    "ravan": Row("ravan", adapter="ravan"),
    "dora": Row("dora", adapter="dora"),
    "hira": Row("hira", adapter="hira"),
    "task_bank": Row("task_bank", "own_a", adapter="orthogonal"),
    "local": Row("average", "alone", about="Train alone, never mix: the baseline that gossip has to beat."),
}
SLOTS: dict[str, dict[str, Callable[..., Any]]] = {
    "schedule": SCHEDULES, "rule": RULES, "trigger": TRIGGERS, "codec": CODECS, "channel": CHANNELS, "guard": GUARDS,
    "wrapper": WRAPPERS, "network": NETWORKS}
_OF_A_ROW = ("rule", "schedule")  # the slots that a method fills
DEFAULTS = {"trigger": "always", "codec": "none", "channel": "perfect", "guard": "norm", "wrapper": "none", "network": "none"}


class Choice(NamedTuple):
    """What fills a slot: a name and its parameters."""

    name: str
    params: Mapping[str, object] = {}


class Method(NamedTuple):
    """All slots of a round, filled."""

    name: str
    schedule: Schedule
    rule: Rule
    trigger: Trigger
    codec: Codec
    channel: Channel
    guard: Guard
    network: Network = Network()
    delay: int = 0  # 1: messages are of the rows as they were before the local phase, during which they travel

    @property
    def held(self) -> bool:
        """Whether who is silent is taken to be where it was when it last spoke."""
        return self.trigger.holds and not self.trigger.always

    @property
    def facts(self) -> dict[str, object]:
        """What was chosen, for the log."""
        return {**self.schedule.facts, **self.rule.facts, **self.trigger.facts, **self.codec.facts, **self.channel.facts,
                **self.network.facts}


class Context(NamedTuple):
    """What a factory may ask for beside its own parameters, by name: of the run, not of the user."""

    layout: Layout
    head: str = "frozen"
    ranks: Sequence[int] | None = None  # the rank of every peer, where they differ
    peers: int | None = None
    rank: int | None = None  # the largest
    weights: Mapping | None = None  # the frozen weight of every adapted layer
    topology: Mixing | None = None
    rounds: int | None = None
    frames: Callable[[int], Any] | None = None  # a row (D,) with the frozen A of a peer
    spectra: Mapping[int, Sequence[float]] | None = None  # of hosted peers, how many directions the inputs of each layer fill

    def known(self, factory: Callable[..., Any]) -> dict[str, object]:
        given = {name: value for name, value in self._asdict().items() if name != "head" and value is not None}
        return {name: value for name, value in given.items() if name in parameters(factory)}


OF_THE_RUN = frozenset(Context._fields)


def fill(name: str, params: Mapping[str, object] = {}, slots: Mapping[str, Choice] = {}) -> dict[str, Choice]:
    """Every slot of method `name` with the user's parameters and his own choice of some slots.

    A parameter of the method goes to the rule or schedule that takes it, to both where both do; a slot that the user fills
    himself takes his own parameters alone. ValueError names what nobody takes.
    """
    if name in RULES and name not in METHODS:
        raise ValueError(f"method.name = {name!r} is a rule, not a method: give it as rule, beside a method; allowed: "
                         f"{', '.join(METHODS)}")
    row = lookup("method.name", METHODS, name)
    filled = {slot: Choice(default) for slot, default in DEFAULTS.items()}
    filled |= {"rule": Choice(row.rule), "schedule": Choice(row.schedule)}
    for slot, choice in slots.items():
        if slot == "rule" and choice.name in METHODS and choice.name not in RULES:
            raise ValueError(f"rule.name = {choice.name!r} is a method, not a rule: give it as method; allowed: {', '.join(RULES)}")
        lookup(f"{slot}.name", SLOTS[slot], choice.name)
        filled[slot] = choice
    takers = {slot: _own(SLOTS[slot][filled[slot].name]) for slot in _OF_A_ROW if slot not in slots}
    merged = {**row.fixed, **params}
    if "pattern" in params and "T" not in params:  # the rounds one by one, in place of the row's interval
        merged.pop("T", None)
    for key, value in merged.items():
        if key in params and not any(key in taken for taken in takers.values()):
            raise _unknown(name, key, value, sorted(set().union(*takers.values())), filled, slots)
        for slot in takers:
            if key in takers[slot]:
                filled[slot] = filled[slot]._replace(params={**filled[slot].params, key: value})
    for slot, choice in filled.items():
        field, called = (slot, choice.name) if slot in slots else ("method", name)
        check_parameters(field, called, SLOTS[slot][choice.name], choice.params, hidden=OF_THE_RUN)
    return filled


def _own(factory: Callable[..., Any]) -> set[str]:
    return set(parameters(factory)) - OF_THE_RUN


def _unknown(name: str, key: str, value: object, allowed: list[str], filled: Mapping[str, Choice],
             slots: Collection[str]) -> ValueError:
    """A parameter of the method that neither its rule nor its schedule takes; one of a slot of the user's belongs there."""
    elsewhere = [slot for slot in _OF_A_ROW if slot in slots and key in _own(SLOTS[slot][filled[slot].name])]
    hint = f"; {elsewhere[0]}.{key} is one of {filled[elsewhere[0]].name!r}" if elsewhere else did_you_mean(key, allowed)
    return ValueError(f"method.{key} = {value!r}: {name!r} has no such parameter{hint}; allowed: "
                      f"{', '.join(allowed) or 'nothing beside name'}")


def phases_field(name: str, params: Mapping[str, object] = {}, slots: Mapping[str, Choice] = {}) -> str | None:
    """The field of a recipe that holds the parameters of a schedule whose phases the topology decides; None for all others."""
    chosen = fill(name, params, slots)["schedule"]
    if chosen.name != "automatic" or chosen.params.get("T", "auto") != "auto" or chosen.params.get("pattern") is not None:
        return None
    return "schedule" if "schedule" in slots else "method"


def accepts(name: str, parameter: str) -> bool:
    """Whether the rule or the schedule of method `name` asks for `parameter`."""
    row = METHODS[name]
    return parameter in parameters(RULES[row.rule]) or parameter in parameters(SCHEDULES[row.schedule])


def build(name: str, context: Context, params: Mapping[str, object] = {}, slots: Mapping[str, Choice] = {}, delay: int = 0) -> Method:
    """The method with all slots filled. ValueError for what does not fit together, by slot and reason."""
    filled = fill(name, params, slots)
    if context.ranks is not None and "ranks" not in parameters(RULES[filled["rule"].name]):
        able = [rule for rule in RULES if "ranks" in parameters(RULES[rule])] if "rule" in slots else \
            [method for method in METHODS if accepts(method, "ranks")]
        raise ValueError(f"{whose_rule(name, slots)} cannot mix peers of unequal ranks {sorted(set(context.ranks))}; allowed: "
                         f"{', '.join(able)}, or one lora.rank")

    def make(slot: str, *arguments: object) -> Any:
        factory = SLOTS[slot][filled[slot].name]
        try:
            return factory(*arguments, **filled[slot].params, **context.known(factory))
        except ValueError as error:
            raise ValueError(str(error) if slot in slots else _as_the_method_s(str(error), slot, factory)) from None

    schedule = among_present(make("schedule", groups_of(context.layout, context.head)), context.layout, context.topology)
    rule = make("wrapper", make("rule", context.layout))
    method = Method(name, schedule, rule, make("trigger"), make("codec"), make("channel"), make("guard"),
                    make("network"), delay)
    check_slots(method, filled)
    check_trigger(method, filled, context.ranks is not None)
    check_channel(method, filled)
    check_codec(method, filled)
    check_guard(method, filled, context.ranks is not None)
    check_delay(method, filled)
    return method


def _as_the_method_s(text: str, slot: str, factory: Callable[..., Any]) -> str:
    """An error's text: the user knows the parameter of a slot that he has not filled as one of the method."""
    names = "|".join(map(re.escape, _own(factory)))
    return re.sub(rf"\b{slot}\.({names})\b", r"method.\1", text) if slot in _OF_A_ROW and names else text


def whose_rule(name: str, slots: Mapping[str, Choice]) -> str:
    """The rule of a run as its recipe names it: by the method, or in the slot itself."""
    return f"rule.name = {slots['rule'].name!r}" if "rule" in slots else f"method.name = {name!r}"


def _whole(method: Method, filled: Mapping[str, Choice]) -> str:
    """A method with what the user has put in the place of its own rule."""
    rule = filled["rule"].name
    return repr(method.name) if rule == METHODS[method.name].rule else f"{method.name!r} with rule {rule!r}"


def check_slots(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError for slots that do not go together."""
    rule, name = method.rule, filled["rule"].name
    if method.schedule.sends not in rule.takes and method.schedule.sends != "nothing":
        raise ValueError(f"schedule.name = {filled['schedule'].name!r} exchanges {method.schedule.sends!r}, which rule {name!r} "
                         f"cannot mix; it takes: {', '.join(sorted(rule.takes))}")


def check_trigger(method: Method, filled: Mapping[str, Choice], unequal: bool) -> None:
    """ValueError for a trigger that the other slots cannot have. unequal: peers have ranks of their own."""
    rule, trigger, name, whole = method.rule, method.trigger, filled["trigger"].name, _whole(method, filled)
    if method.held and (rule.dated or rule.lossless or method.schedule.sends == "active"):
        why = ("its messages mean something in their own round alone" if rule.dated else "its copies have to stay equal at both ends"
               if rule.lossless else "another factor is exchanged from round to round")
        raise ValueError(f"trigger.name = {name!r} holds messages back, which {whole} cannot have: {why}; "
                         "allowed: always, or a trigger that leaves out a silent link")
    if not trigger.always and rule.lossless:
        raise ValueError(f"trigger.name = {name!r} leaves links out, which {whole} cannot have: its copies have to stay equal "
                         "at both ends; allowed: always")
    if not trigger.always and (rule.columns or rule.exchanges > 1 or rule.conserves and not (trigger.holds or trigger.answers)):
        why = ("what a peer keeps has to leave it whole" if rule.columns else "it exchanges twice in a round" if rule.exchanges > 1
               else "what its peers keep has to cancel over all of them")
        raise ValueError(f"trigger.name = {name!r} leaves messages out, which wrapper.name = {filled['wrapper'].name!r} cannot have: "
                         f"{why}; allowed: always")
    if trigger.merges is not None and rule.needs == "static":
        raise ValueError(f"trigger.name = {name!r} ends with a merge of all, but {whole} needs the same W in every round")
    if trigger.common_start and unequal:
        raise ValueError("trigger.start = 'common' needs peers that start from the same row, which those of unequal ranks do not; "
                         "allowed: sent")
    if trigger.pairs and not (rule.linear and method.schedule.sends == "pairs"):
        raise ValueError(f"trigger.norm = 'product' needs messages of A and B as they are, which {whole} does not send in "
                         "every round; allowed: factors")
    if trigger.tensors is not None and not (rule.linear and rule.averages):
        raise ValueError(f"trigger.name = {name!r} sends the tensors of a row one by one, which {whole} cannot mix; allowed: "
                         "methods that average rows")
    if trigger.measures and not method.network.timed:
        raise ValueError("trigger.bandwidth = 'measured' needs a network to measure; allowed: a number for each peer, or a network")


def check_channel(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError for a channel that the other slots cannot have."""
    rule, channel, name, whole = method.rule, method.channel, filled["channel"].name, _whole(method, filled)
    if rule.lossless and not channel.perfect:
        raise ValueError(f"channel.name = {name!r} loses messages, which {whole} cannot have: its copies "
                         "have to stay equal at both ends; allowed: perfect")
    if rule.conserves and not channel.perfect:
        raise ValueError(f"channel.name = {name!r} loses messages, which {whole} cannot have: what its peers keep has to "
                         f"cancel over all of them (wrapper.name = {filled['wrapper'].name!r}); allowed: perfect")
    if channel.delays and (rule.dated or method.schedule.sends == "active"):
        why = "its messages mean something in their own round alone" if rule.dated else "another factor is exchanged in every round"
        raise ValueError(f"channel.name = {name!r} delays messages, which {whole} cannot have: {why}; allowed: a channel "
                         "without delay")
    if channel.delays and method.held:
        raise ValueError(f"channel.name = {name!r} delays messages: with trigger.name = {filled['trigger'].name!r} no peer would know "
                         "what its neighbours hold; allowed: trigger always, or a channel without delay")
    if channel.air is not None:
        cannot = ("a trigger" if not method.trigger.always else "a codec" if not method.codec.exact
                  else "a rule that needs each message by itself" if not (rule.linear and rule.averages) else None)
        if cannot:
            raise ValueError(f"channel.name = {name!r} delivers sums of numbers, which {cannot} cannot have; allowed with it: trigger "
                             "always, codec none, a method that averages rows")
    if channel.updates and not rule.updates:
        raise ValueError("channel.payload = 'gradient' is what a local phase changed, but messages are where it led; allowed: "
                         "wrapper: updates, or payload difference or model")
    if channel.cancels:
        cannot = ("a trigger" if not method.trigger.always else "a codec of differences" if method.codec.update is not None
                  else "a rule that does not average rows" if not (rule.linear and rule.averages)
                  else "a guard that weighs messages" if method.guard.screen is not None else None)
        if cannot:
            raise ValueError(f"channel.name = {name!r} adds noise that cancels in the sums of one round alone, which {cannot} cannot "
                             "have; allowed with it: trigger always, methods that average rows, guard norm or finite")
    if channel.static and method.schedule.sends == "active":
        raise ValueError(f"channel.payload = 'difference' is to what was told before, but {method.name!r} exchanges another factor "
                         "from round to round; allowed: payload model")
    if channel.aggregations != 1 and not (rule.linear and filled["wrapper"].name == "none"):
        raise ValueError(f"channel.aggregations: {whole} cannot mix more than once in a round; allowed: 1, or a method that "
                         "averages rows, without wrapper")


def check_codec(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError for a codec that is more than rounding, with slots that cannot do with it."""
    if method.codec.update is not None:
        check_differences(method, filled)
    elif method.codec.partial:
        check_partial(method, filled)


def check_guard(method: Method, filled: Mapping[str, Choice], unequal: bool) -> None:
    """ValueError for a guard that weighs or replaces messages, with a rule that does not average them."""
    rule, guard, whole = method.rule, method.guard, _whole(method, filled)
    if guard.screen is None:
        return
    why = ("its messages are not averaged with weights" if not rule.averages else "its messages have many lengths"
           if unequal or rule.readable is not None else "what its peers keep has to cancel over all of them" if rule.conserves
           else "what a peer keeps has to leave it whole" if rule.columns
           else "only the sum of its messages arrives" if method.channel.air is not None
           else "it does not average numbers as they are" if guard.numbers and not rule.linear else None)
    if why:
        raise ValueError(f"guard.name = {filled['guard'].name!r} gives messages other weights or values, which {whole} cannot have: "
                         f"{why}; allowed: norm, finite, or a method that averages, such as lora")


def check_delay(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError where messages of rows from before the local phase cannot be mixed with what it changed meanwhile."""
    if method.delay not in (0, 1):
        raise ValueError(f"delay = {method.delay!r} is not allowed; allowed: 0, 1")
    if not method.delay:
        return
    rule, channel, whole = method.rule, method.channel, _whole(method, filled)
    why = (f"wrapper.name = {filled['wrapper'].name!r} sends what the local phase made" if filled["wrapper"].name != "none"
           else "its messages mean something in their own round alone" if rule.dated
           else "its copies have to stay equal at both ends" if rule.lossless
           else "a change meanwhile cannot be added to what it makes of messages" if not (rule.averages or rule.of_rows)
           else f"trigger.name = {filled['trigger'].name!r} answers what arrives" if method.trigger.answers
           else f"channel.name = {filled['channel'].name!r} delays messages itself" if channel.delays
           else f"channel.name = {filled['channel'].name!r} delivers sums alone" if channel.air is not None
           else f"channel.aggregations = {channel.aggregations or 'auto'} has more than one exchange" if channel.aggregations != 1
           else None)
    if why:
        raise ValueError(f"delay = 1 mixes what was sent before the local phase, which {whole} cannot have: {why}; allowed: 0, or "
                         "methods that average, such as lora, adf, decaf")


def check_differences(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError where copies at both ends could not follow, or what is left out would be lost."""
    rule, trigger, name, whole = method.rule, method.trigger, filled["codec"].name, _whole(method, filled)
    why = ("its messages mean something in their own round alone" if rule.dated else "it sends compressed differences itself"
           if rule.lossless else "each mix turns the frame of its factors (decaf: unless gauge own)" if rule.changes_basis
           else "it exchanges twice in a round" if rule.exchanges > 1 else "what a peer keeps has to leave it whole" if rule.columns
           else "it adds what mixing did in the last round, and what is left out for later makes that grow" if rule.remembers
           else "its message is not its row" if not (rule.averages or rule.of_rows) else None)
    if why:
        raise ValueError(f"codec.name = {name!r} sends differences to what was known before, which {whole} cannot have: {why}; "
                         "allowed: none, bfloat16, float16, int8, int4, or a rule that averages")
    if not method.channel.perfect:
        raise ValueError(f"channel.name = {filled['channel'].name!r} loses messages, but codec {name!r} sends differences, whose "
                         "copies have to stay equal at both ends; allowed: channel perfect, or codec.memory feedback or none where "
                         "the codec has it")
    if trigger.tensors is not None or trigger.common_start or trigger.merges is not None or trigger.answers or trigger.greets:
        raise ValueError(f"trigger.name = {filled['trigger'].name!r} speaks to some neighbours, or of some tensors, alone, but codec "
                         f"{name!r} sends differences, whose copies have to stay equal at all of them; allowed: always, event, sparq, "
                         "periodic, late without merge")


def check_partial(method: Method, filled: Mapping[str, Choice]) -> None:
    """ValueError where a message that holds only a part of what is to be said would be taken for all of it."""
    rule, name = method.rule, filled["codec"].name
    if not (rule.linear and rule.averages) or rule.exchanges > 1 or rule.columns:
        raise ValueError(f"codec.name = {name!r} with this memory sends a part of the numbers a round, which {_whole(method, filled)} "
                         "cannot mix: it does not average numbers as they are; allowed: codec.memory differences, or a rule such as "
                         "average")
    if method.held:
        raise ValueError(f"trigger.name = {filled['trigger'].name!r} holds messages back, but codec {name!r} with this memory sends "
                         "other numbers in every round; allowed: trigger always, or codec.memory differences")


def check_topology(method: Method, topology: Any, slots: Mapping[str, Choice] = {}) -> None:
    """ValueError where W(t) changes but the rule needs one that does not, or needs equal rows and has others, where rows do
    not sum to one (what does not say which sums do passes), where links that go one way are to be answered, and for what
    the rule itself refuses."""
    trigger = method.trigger
    if method.codec.update is not None and getattr(topology, "period", None) != 1:
        raise ValueError("codec.memory = 'differences' needs a topology that is the same in every round: who was no neighbour for a "
                         "while has missed differences; allowed: ring, complete, ... (`dfl list`), or codec.memory feedback or none "
                         "where the codec has it")
    if getattr(topology, "sums", None) == "column" and not method.rule.columns:
        raise ValueError(f"topology.name = {topology.name!r} has columns that sum to one, but not rows: receivers would not average; "
                         "allowed: weights that are doubly or row stochastic, or wrapper: push_sum")
    method.rule.check(topology)
    if method.channel.static and getattr(topology, "period", None) != 1:
        raise ValueError("channel.payload = 'difference' needs a topology that is the same in every round, since a reference is "
                         "told to neighbours only now and then; allowed: ring, complete, ... (`dfl list`), or payload model")
    if (trigger.answers or trigger.greets) and not np.array_equal((w := topology.matrix(0)) != 0, (w != 0).T):
        raise ValueError("topology has links that go one way, over which no peer can answer, as this trigger wants; allowed: a "
                         "topology of undirected links")
    if method.rule.needs == "any":
        return
    rule = whose_rule(method.name, slots)
    # a mixing sequence from outside may not tell its period
    if getattr(topology, "period", None) != 1:
        raise ValueError(f"{rule} needs a topology that is the same in every round; allowed: ring, complete, "
                         "... (`dfl list`)")
    w = topology.matrix(0)
    if method.rule.needs == "complete" and not np.allclose(w, w[0], rtol=0, atol=1e-12):
        raise ValueError(f"{rule} needs every peer to receive from every other with equal weights; allowed: "
                         "topology complete")


def describe_slot(slot: str) -> dict[str, str]:
    return {name: first_line(factory) for name, factory in SLOTS[slot].items()}


def filled_by(name: str) -> str:
    """The slots that a method fills, as a recipe would: `rule: average, schedule: alternate`."""
    row = METHODS[name]
    fixed = ", ".join(f"{key}: {value}" for key, value in row.fixed.items())
    adapter = f", adapter: {row.adapter}" if row.adapter else ""
    return f"rule: {row.rule}, schedule: {f'{{name: {row.schedule}, {fixed}}}' if fixed else row.schedule}{adapter}"


def describe() -> dict[str, str]:
    return {name: row.about or first_line(RULES[row.rule]) for name, row in METHODS.items()}
