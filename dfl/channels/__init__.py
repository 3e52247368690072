"""What the way does to a message: `build(name, **parameters) -> Channel`."""

from collections.abc import Callable

from dfl.channels.air import over_the_air
from dfl.channels.attack import attack
from dfl.channels.delay import delay
from dfl.channels.lossy import lossy
from dfl.channels.noise import noise
from dfl.channels.perfect import perfect
from dfl.channels.privacy import masked, zip_noise
from dfl.channels.segments import bursts, segments
from dfl.slots import Channel

CHANNELS: dict[str, Callable[..., Channel]] = {"perfect": perfect, "lossy": lossy, "segments": segments, "bursts": bursts,
                                               "noise": noise, "delay": delay, "over_the_air": over_the_air, "attack": attack,
                                               "zip_noise": zip_noise, "masked": masked}
