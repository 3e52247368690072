"""What a zenoh session of a run may do, and others with it: its addresses, its certificates, and who may write and read
what.

Keys: `dfl/to/J/K` is what process K tells process J, `dfl/alive/K/START` says that a start of K is there. Over TLS both
ends of a link show a certificate of the run's authority, and every process lets process-K write under K's name alone,
listen to what is for K alone, and be there as K alone; whatever else comes is dropped before this process sees it.
"""

import contextlib
import importlib.util
import json
import socket
from typing import Any

from dfl.transport.certificates import Identity, name_of
from dfl.transport.mail import Address

MISSING = "membership.transport = 'zenoh' needs the package eclipse-zenoh: pip install 'dfl[zenoh]'"
# zenoh puts a message together in memory before it gives it away: a piece and its head, and no more
MAX_PIECE = 2**20
_READS_AND_WRITES = ("put", "delete", "declare_subscriber", "query", "reply", "declare_queryable", "liveliness_token",
                     "liveliness_query", "declare_liveliness_subscriber")
_LOOKS = ("declare_liveliness_subscriber", "liveliness_query")


def key_of(receiver: object, sender: object) -> str:
    return f"dfl/to/{receiver}/{sender}"


def alive_key(process: object, start: object) -> str:
    return f"dfl/alive/{process}/{start}"


def require() -> None:
    """ValueError where zenoh is not installed. Loads nothing, as a process that has not forked yet may ask."""
    if importlib.util.find_spec("zenoh") is None:
        raise ValueError(MISSING)


def library() -> Any:
    """zenoh, which is loaded where it is used only. ValueError where it is not installed."""
    require()
    import zenoh
    return zenoh


def open_session(listen: Address, seeds: list[Address], size: int, patience: float, identity: Identity | None) -> Any:
    """A session of a run with `size` processes. identity: certificates; None: without TLS, within one machine.

    ConnectionError where it cannot listen, or its certificates are none.
    """
    zenoh = library()
    config = zenoh.Config()
    for name, value in settings(listen, seeds, size, patience, identity).items():
        config.insert_json5(name, json.dumps(value))
    try:
        return zenoh.open(config)
    except zenoh.ZError as error:
        why = " ".join(str(error).split(" at /")[0].split())[:200]
        raise ConnectionError(f"zenoh cannot listen at {listen[0]}:{listen[1]}: {why}") from None


def settings(listen: Address, seeds: list[Address], size: int, patience: float,
             identity: Identity | None) -> dict[str, Any]:
    """By name in zenoh's configuration. Nobody is found but through the addresses given and those that members tell."""
    protocol = "tls" if identity else "tcp"
    found = {
        "mode": "peer",
        "scouting/multicast/enabled": False,
        "listen/endpoints": [_endpoint(protocol, listen)],
        "listen/exit_on_failure": True,
        "listen/timeout_ms": 0,
        "connect/endpoints": [_endpoint(protocol, seed) for seed in seeds],
        "connect/exit_on_failure": False,
        "connect/timeout_ms": -1,  # again and again
        "open/return_conditions/connect_scouted": False,  # nobody waits for others here
        "connect/retry": {"period_init_ms": 300, "period_max_ms": 1000, "period_increase_factor": 1.5},
        "transport/shared_memory/enabled": False,
        "transport/unicast/max_sessions": 4 * size + 16,
        "transport/link/protocols": [protocol],
        "transport/link/rx/max_message_size": 2 * MAX_PIECE,
        # a link that is cut for less than the patience is no lost link: neither silence nor a full queue ends it before
        "transport/link/tx/lease": max(1000, int(2000 * patience)),
        "transport/link/tx/queue/congestion_control/block/wait_before_close": int(1e6 * full_queue_seconds(patience)),
    }
    if identity:
        found |= {"transport/link/tls": _tls(identity), "access_control": access(size)}
    return found


def full_queue_seconds(patience: float) -> float:
    """How long a message may wait for a link that takes none, before the link is closed."""
    return 1.25 * patience


def _endpoint(protocol: str, address: Address) -> str:
    host, port = address
    return f"{protocol}/[{host}]:{port}" if ":" in host else f"{protocol}/{host}:{port}"


def _tls(identity: Identity) -> dict[str, Any]:
    """Both ends show a certificate. It names a process, not an address: who answers at an address is known by that."""
    own, key = str(identity.certificate), str(identity.key)
    return {"root_ca_certificate": str(identity.authority), "enable_mtls": True, "verify_name_on_connect": False,
            "listen_certificate": own, "listen_private_key": key,
            "connect_certificate": own, "connect_private_key": key}


def access(size: int) -> dict[str, Any]:
    """Of process K's certificate: what may come in over its links. Of all others': nothing."""
    rules = [_rule("out", "egress", _READS_AND_WRITES, "dfl/**")]
    subjects: list[dict[str, Any]] = [{"id": "all"}]
    policies = [{"id": "all", "rules": ["out"], "subjects": ["all"]}]
    for k in range(size):
        rules += [_rule(f"writes-{k}", "ingress", ("put",), key_of("*", k)),
                  _rule(f"reads-{k}", "ingress", ("declare_subscriber",), key_of(k, "*")),
                  _rule(f"is-{k}", "ingress", ("liveliness_token",), alive_key(k, "*")),
                  _rule(f"looks-{k}", "ingress", _LOOKS, alive_key("*", "*"))]
        subjects.append({"id": name_of(k), "cert_common_names": [name_of(k)]})
        policies.append({"id": name_of(k), "rules": [rule["id"] for rule in rules[-4:]], "subjects": [name_of(k)]})
    return {"enabled": True, "default_permission": "deny", "rules": rules, "subjects": subjects, "policies": policies}


def _rule(name: str, flow: str, messages: tuple[str, ...], key: str) -> dict[str, Any]:
    return {"id": name, "permission": "allow", "flows": [flow], "messages": list(messages), "key_exprs": [key]}


def reserve(listen: Address, host: str) -> tuple[socket.socket, Address]:
    """A port that nobody else takes until the session opens, and where that listens: at `host` where that is an address
    of this machine, as zenoh tells others all addresses at which it listens. A machine may know itself by the name
    of its loopback interface, at which no other reaches it."""
    for at in (listen[0],) if listen[0] else (host, "0.0.0.0"):
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier start may linger
        with contextlib.suppress(OSError):
            address = socket.gethostbyname(at)
            if listen[0] or not address.startswith("127."):
                held.bind((address, listen[1]))
                return held, held.getsockname()[:2]
        held.close()
    raise ConnectionError(f"cannot listen at {host}:{listen[1]}: the port is taken")
