"""`dfl export`: one model of a run as a folder for others, a PEFT adapter or the whole merged model, with its model card."""

import json
import os
import re
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dfl import tasks
from dfl.config import Config
from dfl.config.schema import plain
from dfl.export import card, merging, push, ranks
from dfl.report import align
from dfl.store import targets
from dfl.store.directory import below, inside, keep_others, others, remove
from dfl.store.runs import read_config
from dfl.store.targets import ABOUT, ADAPTER_CONFIG
from dfl.tasks import embedded
from dfl.tasks.chat import read_template

BASE_CONFIG = "base_config"  # a configuration beside an adapter would make it look like a whole model


class Wish(NamedTuple):
    """What is asked for, as on the command line."""

    peer: str = "consensus"
    output: Path | None = None
    rounds: int | None = None
    rank: int | None = None
    merge: bool = False
    dtype: str = "auto"
    shard_size: str = "5GB"
    base: str | None = None
    push: str | None = None
    private: bool = False
    overwrite: bool = False
    best: bool = False


class Exported(NamedTuple):
    """Where the folder lies and what there is to say about it; `url` where it was uploaded."""

    folder: Path
    facts: card.Facts
    url: str | None


def export(run: Path, wish: Wish, overrides=()) -> Exported:
    """Write one model of `run` to a folder of its own, and upload it where that is asked for.

    ValueError for what cannot be, before anything is written; OSError for a disk or a hub that fails. A folder is there whole
    or not at all; one that could not be uploaded stays.
    """
    _check(wish)
    config = read_config(run, overrides)
    record = targets.read_json(run / "run.json")
    checkpoint = targets.choose_checkpoint(run, wish.rounds)
    adapter = targets.best_of(run, wish.peer) if wish.best else targets.adapter_of(checkpoint, wish.peer)
    rounds = targets.read_json(adapter / "best.json")["round"] if wish.best else int(checkpoint.name.removeprefix("round-"))
    output = wish.output or run / "exports" / _name(checkpoint, wish)
    earlier = _check_output(output, wish.overwrite)
    if wish.push and output.exists() and others(output, earlier):
        raise ValueError(f"--output {str(output)!r} also holds {others(output, earlier)[0]!r}, which would be uploaded; give another "
                         "--output, or move it away")
    base = base_name(record["facts"]["base"], config.model.name, wish)
    # a name that nobody else has: this folder is removed as it is
    draft = output.absolute().with_name(f".{output.absolute().name}.{secrets.token_hex(8)}.draft")
    try:
        facts = _write(draft, wish, config, record, run, rounds, adapter, base, _origin(checkpoint / wish.peer))
        _open_to_others(draft)
        _replace(output, draft, earlier)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(output, facts, push.upload(output, wish.push, wish.private) if wish.push else None)


def _open_to_others(folder: Path) -> None:
    """The modes that the user's umask gives: files of weights are made readable for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _check(wish: Wish) -> None:
    if wish.dtype != "auto" and not wish.merge:
        raise ValueError(f"--dtype {wish.dtype!r} is the type of a merged model: add --merge")
    if wish.best and wish.rounds is not None:
        raise ValueError(f"--round {wish.rounds} and --best: give one of them")
    if wish.private and not wish.push:
        raise ValueError("--private says how to upload: add --push OWNER/NAME")
    if wish.rank is not None and wish.rank < 1:
        raise ValueError(f"--rank {wish.rank} is not allowed; allowed: 1 or more")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", wish.shard_size):
        raise ValueError(f"--shard-size {wish.shard_size!r} is not a size; allowed: a number with KB, MB, GB or TB, such as 5GB")
    if wish.push:
        push.check(wish.push)


def _name(checkpoint: Path, wish: Wish) -> str:
    parts = ["best" if wish.best else checkpoint.name, wish.peer if wish.peer == "consensus" else f"peer-{wish.peer}"]
    return "-".join(parts + ([f"rank{wish.rank}"] if wish.rank else []) + (["merged"] if wish.merge else []))


def _check_output(output: Path, overwrite: bool) -> list[Path]:
    """The files of the export that will be replaced. Only an earlier export is ever replaced, and only on request."""
    if output.is_symlink():
        raise ValueError(f"--output {str(output)!r} is a symbolic link, and nothing is replaced through one; give the folder itself")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    if not (output / ABOUT).is_file():
        raise ValueError(f"--output {str(output)!r} exists and is no export; give another folder")
    if not overwrite:
        raise ValueError(f"--output {str(output)!r} holds an export already; pass --overwrite to replace it, or another --output")
    try:
        about = targets.read_json(output / ABOUT)
        names = about["files"] if about["made_by"] == "dfl" else None
        return [path for path in (output / name for name in names) if inside(output, path) and not path.is_symlink()]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--output {str(output)!r}: its {ABOUT} does not say which files the export has written, so none is removed; "
                         "give another --output") from None


def _replace(output: Path, draft: Path, earlier: list[Path]) -> None:
    """Give the new folder its name. What else lay in the old one moves into it. ValueError where both have a file of that name."""
    if not output.exists():
        os.replace(draft, output)
        return
    new, ours = set(below(draft)), {path.relative_to(output).as_posix() for path in earlier}
    taken = new.union(*map(_parents, new))
    both = [name for name in below(output) if name not in ours and (name in taken or not new.isdisjoint(_parents(name)))]
    if both:
        raise ValueError(f"--output {str(output)!r}: {both[0]!r} is there, and the earlier export has not written it, so it is not "
                         "replaced; give another --output, or move it away")
    aside = draft.with_suffix(".aside")
    os.replace(output, aside)
    os.replace(draft, output)
    remove(aside, [aside / path.relative_to(output) for path in earlier])
    keep_others(aside, output)


def _parents(name: str) -> set[str]:
    return {parent.as_posix() for parent in PurePosixPath(name).parents}


def base_name(used: str, written: str, wish: Wish) -> str:
    """What the adapter calls its base model: a hub name, or the folder that was used here, which nobody else has.

    ValueError for an upload that would name such a folder.
    """
    if wish.base:
        return wish.base
    if wish.push and written == "minilm":
        return embedded.HUB_NAME
    if wish.push and not wish.merge and Path(used).is_dir():
        raise ValueError(f"--push {wish.push!r}: the base model is the folder {used!r}, which nobody else has; give its name on the "
                         "hub with --base OWNER/NAME, or --merge the adapter into it")
    return used


def _write(draft: Path, wish: Wish, config: Config, record: dict[str, Any], run: Path, rounds: int, adapter: Path,
           base: str, origin: str | None) -> card.Facts:
    """The whole folder but for its name; what there is to say about it."""
    names = record["facts"]["label_names"]
    draft.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(adapter, draft)
    for name in ("consensus.json", "best.json"):
        (draft / name).unlink(missing_ok=True)
    losses = ranks.refactor_folder(draft, wish.rank) if wish.rank else []
    settings = targets.read_json(draft / ADAPTER_CONFIG)
    merged = None
    if wish.merge:
        merged = merging.merge_folder(draft, config, names, wish.dtype, wish.shard_size)
    else:
        (draft / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": base}, indent=2, sort_keys=True))
        base_config, processor = tasks.load_processor(config.model, config.data, names)
        base_config.save_pretrained(draft / BASE_CONFIG)
        merging.save_processor(processor, draft)
        if card.writes(config):
            merging.save_generation(record["facts"]["base"], draft)
    facts = card.Facts(config, record, run, rounds, wish.peer, origin, base, settings, losses, merged, wish.push)
    (draft / "README.md").write_text(card.render(facts), encoding="utf-8")
    written = sorted({ABOUT, *(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())})
    (draft / ABOUT).write_text(json.dumps(_about(config, names, facts) | {"files": written}, indent=1))
    return facts


def _origin(adapter: Path) -> str | None:
    """How a consensus was made."""
    return targets.read_json(adapter / "consensus.json")["consensus"] if (adapter / "consensus.json").is_file() else None


def _about(config: Config, names: list[str], facts: card.Facts) -> dict[str, Any]:
    """What `dfl eval` has to know beside the weights. No path of the machine: the folder may be uploaded."""
    data = config.data
    columns = {key: getattr(data, key) for key in ("text", "pair", "label", "prompt", "response", "messages", "tools", "system",
                                                   "learn", "chosen", "rejected", "image", "max_length")}
    columns["template"] = read_template(data)  # itself, as a path of this machine says nothing elsewhere
    model = {"task": plain(config.model.task), "dtype": facts.merged.dtype if facts.merged else config.model.dtype}
    if not facts.merged:
        model["layers"] = config.model.layers
    measured = {key: plain(getattr(config.eval, key)) for key in ("metrics", "primary")}
    found = {"made_by": "dfl", "model": model, "data": columns, "eval": measured, "label_names": names, "peer": facts.peer,
             "round": facts.rounds}
    talks = card.talks(facts)
    return found if talks is None else found | {"conversations": talks}


def lines(exported: Exported) -> list[str]:
    """What to say about an export, in a few lines; one for each layer where the rank was changed."""
    facts, folder = exported.facts, exported.folder
    whose = f"consensus of {facts.config.peers} peers" if facts.peer == "consensus" else f"peer {facts.peer}"
    what = f"merged model, {facts.merged.dtype}" if facts.merged else f"PEFT adapter, rank {card.rank_text(facts.settings)}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    told = f"{size / 1e6:.1f} MB" if size > 1e5 else f"{size / 1e3:.1f} kB"
    said = [f"{folder}: {what}, {told}; {whose} after round {facts.rounds}"]
    if facts.losses:
        rows = [["layer", "rank", "relative error"], *([loss.layer, str(loss.rank), f"{loss.relative:.3g}"] for loss in facts.losses)]
        rows.append(["all layers", "", f"{ranks.total(facts.losses):.3g}"])
        said += [f"refactored to rank {facts.settings['r']}; Frobenius error of the cut, relative to the layer's ΔW:", align(rows)]
    if facts.merged:
        said.append(f"logits of a probe differ from the adapter's by {facts.merged.difference:.2g}, the largest is "
                    f"{facts.merged.largest:.2g}")
    for metric, values in card.evaluation(facts).items():
        if values["this"] is not None:
            said.append(f"{metric} {values['this']:.4f}" + ("" if facts.evaluated else ", before the change of rank or type"))
    said += [f"how to load it: {folder / 'README.md'}", f"evaluate it: python -m dfl eval {folder} --run {facts.run}"]
    if card.writes(facts.config):
        said.append(f'ask it, by stock transformers alone: python -m dfl generate {folder} "a prompt"')
    return said + ([f"uploaded: {exported.url}"] if exported.url else [])
