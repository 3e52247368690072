"""Who belongs to a run: before the first round its processes compare what they were started with and what they have read.

A process that differs is refused, with the field, by all of them alike. What is compared is small: settings as text, and digests
of the base model, the examples, their partition and the first graphs. The digests are saved with every checkpoint as well, and a run
goes on only with what has the same ones.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from dfl.transport.base import Transport, links_of
from dfl.transport.shards import whole
from dfl.version import __version__

# the environment variable with a secret that the processes of a run share; it never travels
SECRET = "DFL_SECRET"
# settings that may differ between the processes of a run: they change no result, or what they lead to is compared itself
_OWN = {"device", "processes", "threads", "timeout", "report_to", "output", "model.name", "data.train", "data.valid", "topology_seed",
        "data_seed"}
# beyond so many bytes of files, the images that go into a digest are a sample, spaced evenly
MAX_SOURCES = 1 << 30


def settings(config, **options: bool) -> dict[str, Any]:
    """What a process was started with, by dotted name, but for what may differ; the seeds as they are used."""
    seeds = {name: config.seed if value is None else value
             for name, value in (("topology_seed", config.topology_seed), ("data_seed", config.data_seed))}
    flat = {key: value for key, value in _flatten(config.to_dict()) if key not in _OWN}
    return {"version": __version__, **flat, **seeds, **{f"--{name}": value for name, value in options.items()}}


def _flatten(tree: Mapping[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def contents(model: torch.nn.Module, train, valid, parts, topology) -> dict[str, Any]:
    """What a process has read and derived: digests of the base model, the examples, their partition and the first graphs.

    Everything goes into them, but for images beyond MAX_SOURCES bytes: about 0.7 s of a core a GB of weights, 9 us a text. Who changes
    how a digest is made raises the version of the checkpoint format, and its upgrade leaves the old ones out.
    """
    found = {"base model": model_digest(model), "label names": list(train.label_names)}
    for name, split in (("training", train), ("evaluation", valid)):
        found |= {f"number of {name} examples": len(split), f"{name} labels": labels_digest(split),
                  f"{name} examples": examples_digest(split)}
    return found | {"partition": _hex(np.asarray(part, dtype=np.int64).tobytes() + b"|" for part in parts),
                    "topology": _hex(repr(links_of(topology, t)).encode() for t in range(3))}


def model_digest(model: torch.nn.Module, without: Collection[int] = ()) -> str:
    """Of all frozen weights: names, shapes, types and bytes. without: the ids of parameters that are left out.

    Adapter and head of PEFT are left out: their start is compared by itself, and what PEFT draws for its own is not used. So are
    buffers that are in no file: the architecture makes them.
    """
    # PEFT begins the names of what its layers add with a prefix of their kind; a model without adapters has none
    prefix = getattr(getattr(model, "base_model", None), "prefix", "modules_to_save")
    saved = model.state_dict().keys()
    tensors = (*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved))

    def parts():
        for name, tensor in tensors:
            if id(tensor) not in without and not any(part in name for part in (prefix, "modules_to_save")):
                yield f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode()
                if hasattr(tensor, "dequantize") and type(tensor).__module__.startswith("torchao"):
                    tensor = tensor.dequantize()
                yield whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    return _hex(parts())


def labels_digest(split) -> str:
    return _hex([np.asarray(split.labels, dtype=np.int64).tobytes()])


def examples_digest(split) -> str:
    """Of all examples as the model gets them, without their label; of images as they are stored (`sources`)."""
    if hasattr(split.features, "digest"):  # on disk, where it was taken as they were tokenised
        return split.features.digest[:16]
    if hasattr(split.features, "sources"):
        return _hex(split.features.sources(MAX_SOURCES))

    def parts():
        for feature in split.features:
            for key, value in sorted(feature.items()):
                value = np.asarray(value)
                if key != "labels" or value.ndim:  # a label of the whole example has a digest of its own
                    yield f"{key} {value.shape} {value.dtype};".encode()
                    yield value.tobytes()

    return _hex(parts())


def check_contents(saved: Mapping[str, Any], now: Mapping[str, Any], config, output) -> None:
    """ValueError unless a run that goes on finds what it was begun with; it names what differs, where it comes from, both digests.

    What was not saved is not compared.
    """
    data = f"data.train = {config.data.train!r}"
    valid = data if config.data.valid is None else f"data.valid = {config.data.valid!r}"
    places = {"base model": f"model.name = {config.model.name!r}", "partition": f"partition = {config.partition.name!r}",
              "topology": f"topology = {config.topology.name!r}"}
    changed = [name for name in now if name in saved and saved[name] != now[name]]
    if changed:
        said = [f"{name} of {places.get(name, valid if 'evaluation' in name else data)} ({now[name]!r} now, {saved[name]!r} then)"
                for name in changed]
        raise ValueError(f"changed since {str(output)!r} was begun: {', '.join(said)}; a run goes on with what it began with: "
                         "put that back, or begin another with another --output")


def _hex(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def check_settings(transport: Transport, fields: Mapping[str, Any]) -> None:
    """ValueError on all processes when one of them has other `fields` than process 0; it names the first, and both values."""
    mine = json.dumps(fields, sort_keys=True, default=str).encode()
    all_fields = [json.loads(data) for data in transport.share(mine)]
    for process, other in enumerate(all_fields):
        for name in [*all_fields[0], *other]:
            here, there = all_fields[0].get(name), other.get(name)
            if here != there:
                raise ValueError(f"{transport.describe(process)} does not belong to this run: {name} = {there!r}, "
                                 f"but {here!r} on {transport.describe(0)}")


def check_secret(transport: Transport, env: Mapping[str, str] = os.environ) -> None:
    """ValueError on all processes unless they have the same DFL_SECRET, or none. Sets the transport's run number.

    The secret does not travel: every process gives a random number, and all these, with its own place, go into a keyed digest
    (HMAC-SHA256) that the others compute as well. A process without the secret can neither make one nor use an old one again.
    """
    secret = env.get(SECRET, "").encode()
    given = transport.share(bytes([bool(secret)]) + os.urandom(16))
    nonce = b"".join(given)
    for other, data in enumerate(given):
        if data[0] != given[0][0]:
            raise ValueError(f"{transport.describe(other)} does not belong to this run: {SECRET} is {_is_set(data)} there, "
                             f"and {_is_set(given[0])} on {transport.describe(0)}")
    proofs = transport.share(_proof(secret, nonce, transport.rank))
    strangers = [k for k, proof in enumerate(proofs) if not hmac.compare_digest(proof, _proof(secret, nonce, k))]
    # process 0 speaks first; if it is the stranger, it may well find nothing wrong, but another one does
    verdicts = [int.from_bytes(data, "big") for data in transport.share(((strangers[0] + 1) if strangers else 0).to_bytes(4, "big"))]
    for judge, verdict in enumerate(verdicts):
        if verdict:
            raise ValueError(f"{transport.describe(verdict - 1)} does not belong to this run: its {SECRET} is not that of "
                             f"{transport.describe(judge)}")
    transport.run = int.from_bytes(hmac.digest(secret, b"run" + nonce, "sha256")[:8], "big")


def _proof(secret: bytes, nonce: bytes, process: int) -> bytes:
    return hmac.digest(secret, b"process %d of " % process + nonce, "sha256")


def _is_set(data: bytes) -> str:
    return "set" if data[0] else "not set"
