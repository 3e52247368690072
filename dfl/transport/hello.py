"""Who may talk to a process of a run that goes on without those it loses: what both ends tell each other first."""

import hmac
from collections.abc import Callable, Mapping
from typing import Any

from dfl.transport.mail import Address

MAX_HELLO = 2**18


class Admission:
    """process: this one, of `size`; about: what it was started with; check(process, its about) -> why that does not
    belong here, or "". secret: of the run; a proof of it is an HMAC-SHA256 over a challenge that the other has drawn.
    """

    def __init__(self, process: int, size: int, secret: bytes, about: Mapping[str, Any],
                 check: Callable[[int, Mapping[str, Any]], str]):
        self.process, self.size, self.secret, self.about, self.check = process, size, secret, dict(about), check
        self._told: set[int] = set()  # who has told its own address

    def hello(self, challenge: str, at: Address) -> dict[str, Any]:
        return {"process": self.process, "about": self.about, "proof": self._proof(challenge, self.process), "at": at}

    def _proof(self, challenge: str, process: int) -> str:
        return hmac.digest(self.secret, f"{challenge} {process}".encode(), "sha256").hex()

    def refused(self, process: int, hello: Mapping[str, Any], challenge: str) -> str:
        """Why a process does not belong here; empty where it does."""
        what = f"process {process} does not belong to this run"
        if not 0 <= process < self.size or process == self.process:
            return f"{what}: allowed are 0 to {self.size - 1} other than {self.process}"
        if not hmac.compare_digest(str(hello["proof"]), self._proof(challenge, process)):
            return f"{what}: its DFL_SECRET is not that of process {self.process}"
        return self.check(process, hello["about"])

    def learn(self, book: dict[int, Address], process: int, hello: Mapping[str, Any]) -> None:
        """Where a process is, and where others are as far as it knows: what one tells of itself counts more."""
        self._told.add(process)
        for other, (host, port) in {**hello.get("book", {}), str(process): hello["at"]}.items():
            k = int(other)
            if k == process or 0 <= k < self.size and k not in self._told | {self.process}:
                book[k] = str(host), int(port)


def checked_hello(tree: dict[str, Any]) -> dict[str, Any]:
    """A hello has its parts, of the right kind: ValueError, KeyError, TypeError or AttributeError where it has not."""
    (host, port), book = tree["at"], tree.get("book", {})
    kinds = ((tree["process"], int), (tree["about"], dict), (tree["proof"], str), (host, str), (port, int),
             (book, dict))
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise ValueError("no hello")
    if not all(key.isdecimal() and len(at) == 2 for key, at in book.items()):
        raise ValueError("no hello")
    return tree
