"""What a part is given, and how it says what it found."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class PartError(Exception):
    """A part ran to its end and found something wrong."""


class Missing(Exception):  # noqa: N818 - nothing is wrong
    """What a part needs is not here; it is left out, with this reason."""


@dataclass
class Setting:
    """kind: cuda or cpu, which takes small sizes. facts: what the part `versions` found."""

    kind: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    said: Path | None = None  # a line for everything that the part at work has said
    failed: list[str] = field(default_factory=list)

    @property
    def small(self) -> bool:
        return self.kind == "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.small else torch.device("cuda", 0)

    def pick(self, large: Any, small: Any) -> Any:
        """The size for a GPU, or for a rehearsal."""
        return small if self.small else large

    def say(self, name: str, value: Any) -> None:
        """At once, so that it is there when the part fails later."""
        with self.said.open("a") as file:
            file.write(json.dumps({name: value}) + "\n")
        print(f"    {name}: {json.dumps(value)}", flush=True)

    def check(self, name: str, good: bool, value: Any = None) -> None:
        """Say a figure and whether it is as it should be; the part fails at its end."""
        self.say(name, {"good": bool(good), **({} if value is None else {"found": value})})
        if not good:
            self.failed.append(name)

    def check_all(self, name: str, told: list[dict]) -> bool:
        """Whether all processes of a part came to their end."""
        good = all("found" in one for one in told)
        self.check(name, good, None if good else told)
        return good

    def synchronize(self) -> None:
        if not self.small:
            torch.cuda.synchronize()
