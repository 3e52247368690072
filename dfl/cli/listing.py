"""dfl list: every name that a recipe may use.

The tables are filled by modules that import torch, which takes seconds. What they came to is kept in the user's cache,
and printed from there until a file of this project changes; never where other packages have put something into them.
"""

import hashlib
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

BESIDE = ("delay", "data.flipped", "train.privacy")  # of a round or a peer, and no slot
HELP = "every method, topology, slot of a round, adapter, task, metric and partition"


def add(parser) -> None:
    pass


def run(args, overrides: list[str]) -> int:
    print("\n".join(lines() if any(group.startswith("dfl.") for group in entry_points().groups) else kept_lines()))
    return 0


def lines() -> list[str]:
    import topologies
    from dfl import extensions, methods, partition, tasks
    from dfl.adapters import kinds
    from dfl.config import schema
    from dfl.metrics.choice import describe as metrics
    extensions.load()
    named = {name: f"{line}\n{'':4}{methods.filled_by(name)}" for name, line in methods.describe().items()}
    slots = [(f"{slot}s ({slot} in a recipe)", methods.describe_slot(slot)) for slot in methods.SLOTS]
    found = []
    for kind, table in (("methods (method in a recipe), and the slots that each fills", named),
                        ("topologies", topologies.describe()), *slots, ("adapters (lora.adapter)", kinds.describe()),
                        ("tasks", tasks.describe()),
                        ("data sources", tasks.describe(tasks.SOURCES)),
                        ("metrics (eval.metrics in a recipe)", metrics()), ("partitions", partition.describe()),
                        ("beside the slots", {field: meaning(schema.Config, field) for field in BESIDE})):
        width = max(map(len, table))
        found += [f"{kind}:", *(f"  {name.ljust(width)}  {line}" for name, line in table.items())]
    return found


def meaning(section: Any, field: str) -> str:
    """What a field of a recipe is for, as its reference has it."""
    from dfl.config.schema import section_of
    name, _, rest = field.partition(".")
    found = section.model_fields[name]
    return meaning(section_of(found.annotation), rest) if rest else found.description


def kept_lines() -> list[str]:
    """The lines from the last time, of the same files; a cache that cannot be read or written is none."""
    path, digest = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfl" / "list.txt", digest_of_files()
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        if first == digest:
            return rest
    except (OSError, ValueError):
        pass
    found = "\n".join(lines()).splitlines()
    draft = path.with_name(f"list-{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text("\n".join([digest, *found]) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        pass
    return found


def digest_of_files() -> str:
    """Of the place, size and time of every module of ours."""
    root, found = Path(__file__).parents[2], hashlib.blake2b(digest_size=16)
    for folder in ("dfl", "topologies"):
        for path in sorted((root / folder).rglob("*.py")):
            told = path.stat()
            found.update(f"{path} {told.st_size} {told.st_mtime_ns}\n".encode())
    return found.hexdigest()
