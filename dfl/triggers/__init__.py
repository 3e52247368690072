"""Whether a peer speaks: `build(name, **parameters) -> Trigger`."""

from collections.abc import Callable

from dfl.slots import Trigger
from dfl.triggers.always import always
from dfl.triggers.event import event
from dfl.triggers.eventgrad import eventgrad
from dfl.triggers.linked import efhc, global_threshold, random_gossip, zero_threshold
from dfl.triggers.sparq import sparq
from dfl.triggers.timed import late, periodic

TRIGGERS: dict[str, Callable[..., Trigger]] = {
    "always": always, "event": event, "sparq": sparq, "eventgrad": eventgrad, "efhc": efhc, "zero_threshold": zero_threshold,
    "global_threshold": global_threshold, "random_gossip": random_gossip, "periodic": periodic, "late": late}
