"""A cell of a study: a run, and what is kept of it in a file beside its folder, so that a study goes on where it was stopped."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dfl


def finish(stored: Path, recipe: Path, regime: Mapping[str, Any], summarise: Callable[[list[dict]], Any], **fields: Any) -> Any:
    """What `summarise` makes of the records of the run, once it has ended; None where `stored` is there already. regime: fields by
    their dotted names. SystemExit(75) where the run was stopped."""
    if stored.exists():
        return None
    given = {key.replace(".", "__"): value for key, value in regime.items()}
    done = dfl.train(recipe, resume=True, output=str(stored.with_suffix("")), **given | fields)
    if not done.finished:
        raise SystemExit(75)
    found, torn = summarise(done.metrics), stored.with_name(stored.name + ".part")
    torn.write_text(json.dumps(found, indent=1))
    torn.replace(stored)
    return found
