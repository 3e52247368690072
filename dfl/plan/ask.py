"""What a plan is asked: the network, the target, and what is compared."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfl.plugins import check_count, check_number, check_positive


class Ask(NamedTuple):
    """bandwidth: Mbit/s; latency: ms; target: of `metric` (None: the recipe's first), mean over peers. step_seconds: of a local step
    of one peer where it will run; None: as measured. probe: rounds. given: the text of each list of candidates. by: what ranks."""

    bandwidth: float
    latency: float
    target: float
    metric: str | None = None
    step_seconds: float | None = None
    probe: int | None = None
    given: Mapping[str, str | None] = {}
    by: str = "seconds"

    def check(self) -> None:
        check_positive("--bandwidth", self.bandwidth)
        check_number("--latency", self.latency)
        if not math.isfinite(self.target):
            raise ValueError(f"--target {self.target} is not allowed; allowed: a number")
        if self.step_seconds is not None:
            check_number("--step-seconds", self.step_seconds)
        if self.probe is not None:
            check_count("--probe", self.probe, 2)

    def network(self, step_seconds: float) -> dict[str, Any]:
        """As a recipe has it, in bytes a second and in seconds."""
        return {"name": "links", "bandwidth": self.bandwidth * 1e6 / 8, "latency": self.latency / 1e3, "compute": step_seconds}
