"""What the way does to a message: `build(name, **parameters) -> Channel`."""

from collections.abc import Callable

from dfl.channels.lossy import lossy
from dfl.channels.perfect import perfect
from dfl.slots import Channel

CHANNELS: dict[str, Callable[..., Channel]] = {"perfect": perfect, "lossy": lossy}
