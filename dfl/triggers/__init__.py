"""Whether a peer speaks: `build(name, **parameters) -> Trigger`."""

from collections.abc import Callable

from dfl.slots import Trigger
from dfl.triggers.always import always
from dfl.triggers.event import event

TRIGGERS: dict[str, Callable[..., Trigger]] = {"always": always, "event": event}
