"""How a process of a run that goes on without those it loses finds the others, at its start and when it comes back."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfl.config import Config
from dfl.run.runtime import PROCESS, START_SECONDS, Place, Worker, node_of_step, told_addresses
from dfl.transport.certificates import Identity, read_identity
from dfl.transport.handshake import SECRET
from dfl.transport.mail import Address, Mail
from dfl.transport.members import Members
from dfl.transport.post import Post
from dfl.transport.survivors import Survivors
from dfl.transport.zenoh_mail import ZenohMail

# addresses of some members, host:port with commas between; and where this process listens
MEMBERS, LISTEN = "DFL_MEMBERS", "DFL_LISTEN"
# the folder with the certificate of this process (dfl/transport/certificates.py)
CERTIFICATES = "DFL_CERTIFICATES"
# at a start, so long for all to have joined that were reached
HAIL_SECONDS = 10.0
# where the addresses of the others are kept, in the folder of a process
BOOK = "members.json"


def make(config: Config, place: Place, worker: Worker | None, about: Mapping[str, Any], known: list[Address],
         env: Mapping[str, str] = os.environ) -> tuple[Survivors, Mail, list[Address]]:
    """The transport of a process that has not joined yet, its connections, and where others may be.

    about: what it was started with; known: addresses that it has kept. Members say it where another's `about` differs.
    """
    seeds = [address_of(text, MEMBERS) for text in env.get(MEMBERS, "").split(",") if text.strip()] + known
    listen, host = _where(worker, seeds, env)
    given: dict[str, Any] = {
        "secret": env.get(SECRET, "").encode(), "about": about, "patience": config.membership.patience, "listen": listen, "host": host,
        "check": lambda process, other: differs(about, other, process)}
    mail: Mail
    if config.membership.transport == "zenoh":
        mail = ZenohMail(place.rank, place.size, identity=_identity(config, place, listen, env), **given)
    else:
        mail = Post(place.rank, place.size, **given)
    members = Members(mail, place.rank, place.size, config.timeout)
    return Survivors(config.peers, members, timeout=config.timeout), mail, seeds


def _identity(config: Config, place: Place, listen: Address, env: Mapping[str, str]) -> Identity | None:
    """This process's certificate, from DFL_CERTIFICATES or RUN/certificates. ValueError where others can come and there is none."""
    folder = Path(env.get(CERTIFICATES) or Path(config.output).parent / "certificates")
    if CERTIFICATES in env or folder.is_dir():
        return read_identity(folder, place.rank)
    if _loopback(listen[0]):
        return None
    raise ValueError("membership.transport = 'zenoh' needs certificates beyond one machine: `dfl certificates RUN --peers N` makes "
                     f"them for a trial, {CERTIFICATES} says where they are")


def join(mail: Mail, transport: Survivors, place: Place, worker: Worker | None, seeds: list[Address], config: Config,
         env: Mapping[str, str] = os.environ) -> bool:
    """Meet the others; whether the run goes on already. ValueError where they refuse this process."""
    if not seeds and PROCESS not in env and place.size > 1:
        host, port = mail.book[place.rank]
        seeds = [address_of(text, "address") for text in told_addresses(place, worker, f"{host}:{port}", START_SECONDS)]
    mail.meet(seeds)

    def call() -> None:
        mail.call()
        if mail.refusals:
            raise ValueError(mail.refusals[0])

    transport.group.connect = call
    begun = transport.group.hail(config.membership.wait)
    if not begun:
        transport.group.await_all(HAIL_SECONDS)
    transport.group.connect = mail.call  # whoever refuses it now is nobody of its run
    return begun


def address_of(text: str, field: str) -> Address:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or not int(port) < 2**16:
        raise ValueError(f"{field} = {text.strip()!r}; allowed: host:port, with commas between several")
    return host.strip("[]"), int(port)


def _where(worker: Worker | None, seeds: list[Address], env: Mapping[str, str]) -> tuple[Address, str]:
    """Where to listen, and under which name others find that. Within one machine nobody else can come."""
    if LISTEN in env:
        host, port = address_of(env[LISTEN], LISTEN)
        return (("127.0.0.1" if _loopback(host) else ""), port), host
    if not seeds and worker is None and (node := node_of_step(env)) is not None:
        return (("127.0.0.1", 0), "127.0.0.1") if _loopback(node) else (("", 0), node)
    others = seeds or ([] if worker else [(env.get("MASTER_ADDR", "127.0.0.1"), 1)])
    if all(_loopback(host) for host, _ in others):
        return ("127.0.0.1", 0), "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(next(address for address in others if not _loopback(address[0])))  # sends nothing
        return ("", 0), probe.getsockname()[0]


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def differs(mine: Mapping[str, Any], theirs: Mapping[str, Any], process: int) -> str:
    """The first of what a process was started with that is not the same here; empty where all is."""
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            return f"process {process} does not belong to this run: {name} = {str(theirs.get(name))[:200]!r} there, " \
                   f"{str(mine.get(name))[:200]!r} here"
    return ""


def keep_book(folder: Path, book: Mapping[int, Address]) -> None:
    """So that this process finds the others when it is started again."""
    draft = folder / f".{BOOK}.draft"
    draft.write_text(json.dumps({str(process): list(address) for process, address in sorted(book.items())}))
    draft.replace(folder / BOOK)


def kept_book(folder: Path) -> list[Address]:
    """What `keep_book` has kept; nothing where it cannot be read."""
    try:
        return [(str(host), int(port)) for host, port in json.loads((folder / BOOK).read_text()).values()]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


