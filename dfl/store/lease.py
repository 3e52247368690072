"""One folder, one writer: a lease on a run directory, which every write of the run checks.

    RUN/.dfl/lease-00000001.json    who has it: a random token, host, process, since when

Who creates the file has the lease. Its modification time is the heartbeat. A file is created by a hard link, which succeeds for one
only; a successor of a dead owner creates the next number before it removes the file of the dead, so that two successors cannot both
believe to be the one. A run that has lost its lease (its machine was asleep, say) finds its file gone at the next write, and stops.

No two clocks are ever compared. Where an owner's process can be looked at, it decides; elsewhere its file is watched by the clock of
the one who waits, and any heartbeat shows that it lives, however the clocks stand.
"""

import errno
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from dfl.store.directory import STATE
from dfl.transport.agreement import together
from dfl.transport.base import Transport

HEARTBEAT_SECONDS = 5.0
# an owner that cannot be seen from here (another host, another container) counts as dead after this time without a heartbeat: twelve
# of them, as a network file system or a busy machine may hold up some
EXPIRY_SECONDS = 60.0
# one whose last heartbeat is older than that by the clock of the file system is watched all the same, as that clock may have jumped
DOUBT_SECONDS = 3 * HEARTBEAT_SECONDS
# a process that was killed a moment ago needs so long to go: a successor that starts at once waits for it
DYING_SECONDS = 2.0
# and this long where the kernel says that it is on its way out: what holds a lot of a GPU's memory takes its time
ENDING_SECONDS = 30.0
# a file system on a network may show within this time only what another machine has written
SHARED_SECONDS = 30.0
_POLL_SECONDS = 0.1
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LeaseLostError(OSError):
    """Another run writes in the folder now, or the folder was removed: this one must not write any more."""


class Owner(NamedTuple):
    """Who has a lease. `boot` and `namespace` tell where the process number `pid` means something, `started` (clock ticks since
    the boot) a process from a later one with its number."""

    number: int
    token: str
    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _this_process(number: int) -> Owner:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    pid = os.getpid()
    return Owner(number, secrets.token_hex(16), socket.gethostname(), _boot(), _namespace(), pid, started(pid) or 0, since)


def _boot() -> str:
    """The machine and its time since it was switched on; host names are not enough, as containers often share one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _namespace() -> str:
    """Process numbers count anew in every container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; 0 for one that has ended (a zombie), None where it cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def ending(pid: int) -> bool:
    """Whether a process is on its way out: it has begun to exit, or SIGKILL waits for it."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = [int(bits, 16) for bits in re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", status, re.M)]
    return bool(flags & 0x4) or any(bits >> (signal.SIGKILL - 1) & 1 for bits in pending)


def lives(owner: Owner) -> bool | None:
    """Whether the process of an owner is there; None when that cannot be seen from here."""
    if (owner.boot, owner.namespace) != (_boot(), _namespace()):
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    begun = started(owner.pid)
    return None if begun is None else begun == owner.started


def owners(folder: Path) -> list[Owner]:
    """Who has a lease in a run directory, or had one and died: none or one, two for a moment when one takes over."""
    found = []
    for path in sorted((folder / STATE).glob("lease-*.json")):
        if match := re.fullmatch(r"lease-(\d{8})\.json", path.name):
            try:
                found.append(Owner(**json.loads(path.read_text()) | {"number": int(match[1])}))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError):  # half of a file, where there are no links: whoever wrote it has to show a heartbeat
                found.append(Owner(int(match[1]), "", "an unknown host", "", "", 0, 0, "an unknown time"))
    return found


def _path(folder: Path, number: int) -> Path:
    return folder / STATE / f"lease-{number:08}.json"


class Lease:
    """The right of this run to write into `folder`. `made`: the folders that were created for it, the outermost first."""

    def __init__(self, folder: Path, number: int, token: str, made: tuple[Path, ...] = ()):
        self.folder, self.number, self.token, self.made = folder, number, token, made
        self._path, self._ended = _path(folder, number), threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Begin to show that this process lives."""
        self._thread = threading.Thread(target=self._beat, name="dfl-lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # lost, which the next write finds out, or a file system that is away for a while
                pass

    def check(self) -> None:
        """Before every write. LeaseLostError when the lease is another run's."""
        if not self.held():
            now = owners(self.folder)
            who = f"{now[-1]} writes there" if now else "its lease was removed"
            raise LeaseLostError(f"{str(self.folder)!r} is no longer this run's: {who}. Nothing more is written. A run loses its "
                                 f"folder when it does not move for {EXPIRY_SECONDS:.0f} s, or when somebody removes the folder")

    def held(self) -> bool:
        try:
            return json.loads(self._path.read_text())["token"] == self.token
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it back. A folder that was made for a run that never began goes as well."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if not self.held():
                return
            unused = not (self.folder / "recipe.yaml").exists()
            if unused and self.folder / STATE in self.made:
                (self.folder / STATE / "marker.json").unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            for folder in reversed(self.made if unused else ()):
                folder.rmdir()
        except OSError:  # others use it already, or the file system has gone: the lease runs out by itself
            pass


def hold(folder: Path, transport: Transport) -> Lease:
    """The lease on a run directory for all processes of a run; process 0 has it and shows the heartbeat.

    ValueError on all of them when a living run has it, and where a process does not see what process 0 has written.
    """
    steps, lease = acquiring(folder) if transport.rank == 0 else None, None
    try:
        # step by step, so that nobody takes process 0 for lost while it waits
        while not transport.agree(int(lease is not None)):
            lease = together(transport, lambda: next(steps) if steps is not None else None)
        told = transport.spread(f"{lease.number} {lease.token}".encode() if lease else b"").decode().split()
        lease = lease or Lease(folder, int(told[0]), told[1])
        together(transport, lambda: _see(lease))
    except BaseException:
        if transport.rank == 0 and lease is not None:
            lease.release()
        raise
    return lease


def _see(lease: Lease) -> None:
    until = time.monotonic() + SHARED_SECONDS
    while not lease.held():
        if time.monotonic() > until:
            raise ValueError(f"output = {str(lease.folder)!r} does not show here what process 0 has written to it; it must lie on a "
                             "file system that all processes share")
        time.sleep(_POLL_SECONDS)


def acquiring(folder: Path) -> Iterator[Lease | None]:
    """None again and again while somebody is watched, then the lease. ValueError when a living run has it."""
    made: list[Path] = []
    try:
        while (lease := (yield from _try(folder, made))) is None:
            yield None
    except BaseException:
        for inner in reversed(made):
            _remove_if_empty(inner)
        raise
    lease.beat()
    yield lease


def _try(folder: Path, made: list[Path]) -> Generator[None, None, Lease | None]:
    """None again and again, and then returns the lease, or None when others were faster."""
    _make(folder / STATE, made)
    found = owners(folder)
    for owner in found:
        yield from _outlast(folder, owner)
    return _create(folder, found, tuple(made))


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass


def _make(folder: Path, made: list[Path]) -> None:
    if folder.is_dir():
        if folder.name == STATE and folder.is_symlink():
            raise ValueError(f"{str(folder)!r} is a symbolic link; a run writes into its own folder only")
        return
    if folder.parent != folder:
        _make(folder.parent, made)
    try:
        folder.mkdir()
        made.append(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise


def _outlast(folder: Path, owner: Owner) -> Iterator[None]:
    """Until a dead owner is known to be dead. ValueError when it lives, or lived until it gave its lease back."""
    alive, started_at = lives(owner), time.monotonic()
    lived = alive
    while alive and time.monotonic() - started_at < (ENDING_SECONDS if ending(owner.pid) else DYING_SECONDS):
        time.sleep(_POLL_SECONDS)
        yield None
        alive = lives(owner)
    if alive or (lived and _heartbeat(folder, owner) is None):
        raise _in_use(folder, owner)
    if alive is None:
        yield from _watch(folder, owner)


def _watch(folder: Path, owner: Owner) -> Iterator[None]:
    """An owner that cannot be seen from here is dead when it is silent for long enough."""
    first = _heartbeat(folder, owner)
    if first is None:
        return
    silent = max(0.0, _now_there(folder) - first)
    patience = max(DOUBT_SECONDS, EXPIRY_SECONDS - silent)
    print(f"dfl: output = {str(folder)!r} belongs to another run ({owner}), which cannot be seen from here; it is taken over "
          f"unless that run shows a heartbeat within {patience:.0f} s", file=sys.stderr, flush=True)
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        if _heartbeat(folder, owner) != first:
            raise _in_use(folder, owner)
        yield None


def _in_use(folder: Path, owner: Owner) -> ValueError:
    return ValueError(f"output = {str(folder)!r} is in use by another run: {owner}. Let it end or stop it, or give another --output. "
                      "A run whose process has ended is taken over at once on its own machine, and from elsewhere after "
                      f"{EXPIRY_SECONDS:.0f} s without a heartbeat")


def _heartbeat(folder: Path, owner: Owner) -> float | None:
    """Seconds by the clock of the file system; None when the file has gone. Opened, as a network file system then asks its server."""
    try:
        with _path(folder, owner.number).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now_there(folder: Path) -> float:
    """The clock by which heartbeats are stamped."""
    probe = folder / STATE / f"candidate-{secrets.token_hex(8)}"
    try:
        probe.write_text("")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _create(folder: Path, dead: list[Owner], made: tuple[Path, ...]) -> Lease | None:
    """None when another was faster."""
    mine = _this_process(max((owner.number for owner in dead), default=0) + 1)
    lease = Lease(folder, mine.number, mine.token, made)
    try:
        _put(folder, mine)
    except FileNotFoundError:  # whoever had made the folder has taken it away
        return None
    if not lease.held():
        return None
    known = {owner.token for owner in dead} | {mine.token}
    if any(owner.token not in known for owner in owners(folder)):  # somebody came in under another number
        _path(folder, mine.number).unlink(missing_ok=True)
        return None
    for owner in dead:
        _path(folder, owner.number).unlink(missing_ok=True)
    for left in (folder / STATE).glob("candidate-*"):
        left.unlink(missing_ok=True)
    return lease


def _put(folder: Path, owner: Owner) -> None:
    """The file of a lease, whole at once, unless it is there."""
    text, path = json.dumps(owner._asdict()), _path(folder, owner.number)
    candidate = folder / STATE / f"candidate-{owner.token}"
    candidate.write_text(text)
    try:
        os.link(candidate, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            pass
    finally:
        candidate.unlink(missing_ok=True)
