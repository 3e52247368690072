"""The command: python -m topologies list | describe | compare | draw | simulate | gallery."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys

from topologies.catalogue import TOPOLOGIES, build, describe

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def quantity(text: str) -> float:
    """Bytes from ``1.2MB``, ``10Gbit``, ``1e6``.

    >>> quantity("10Gbit"), quantity("1.5MB"), quantity("1e6")
    (1250000000.0, 1500000.0, 1000000.0)
    """
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(b|bit|bits|)(?:/s|ps)?", text.strip().lower())
    if not match or not (float(match[1]) > 0 and math.isfinite(float(match[1]))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size such as 1.2MB, 10Gbit or 1e6")
    return float(match[1]) * UNITS[match[2]] / (8 if match[3].startswith("bit") else 1)


def setting(text: str) -> tuple[str, object]:
    """KEY=VALUE with the value as JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, json_or_text(value)


def json_or_text(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m topologies", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", help="all names with a line each")
    lister.add_argument("--json", action="store_true")
    _add_compare(commands)
    for name, help_text in (
        ("describe", "all that is known about one topology"),
        ("draw", "graph with weights, W over rounds, consensus curve; PNG or SVG"),
        ("simulate", "pure averaging, measured against the predicted rate"),
    ):
        _add_single(commands.add_parser(name, help=help_text), name)
    gallery = commands.add_parser("gallery", help="draw every topology into a folder with a page")
    gallery.add_argument("--output", default="topologies/gallery", help="folder (default: %(default)s)")
    gallery.add_argument("--names", nargs="+", metavar="NAME", help="only these pictures; the page is left alone")
    return top


def _add_compare(commands) -> None:
    compare = commands.add_parser("compare", help="rank topologies by predicted time to consensus")
    compare.add_argument("--peers", type=int, required=True)
    compare.add_argument("--names", nargs="+", metavar="NAME", help="only these")
    compare.add_argument("--message", type=quantity, default=1e6, metavar="SIZE", help="bytes of a message (default 1MB)")
    compare.add_argument("--bandwidth", type=quantity, default=1.25e8, metavar="SPEED", help="per second (default 1Gbit)")
    compare.add_argument("--latency", type=float, default=1e-3, metavar="SECONDS")
    compare.add_argument("--node-size", type=int, default=1, help="peers per node that talk at --node-bandwidth")
    compare.add_argument("--node-bandwidth", type=quantity, default=1.25e10, metavar="SPEED", help="default 100Gbit")
    compare.add_argument("--tolerance", type=float, default=1e-3, help="|x - mean| relative to the start")
    compare.add_argument("--seed", type=int, default=0)
    compare.add_argument("--json", action="store_true")


def _add_single(command, name: str) -> None:
    command.add_argument("name", metavar="NAME")
    command.add_argument("--peers", type=int, help="default: what suits the topology")
    command.add_argument("--weights", type=json_or_text, default="metropolis", help="a rule, or {\"rule\": .., ..}")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--set", type=setting, nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="params")
    if name == "draw":
        command.add_argument("--output", required=True, metavar="FILE", help="ends in .png or .svg")
        command.add_argument("--rounds", type=int, default=4, help="rounds drawn of a sequence (default 4)")
        return
    command.add_argument("--json", action="store_true")
    if name == "simulate":
        command.add_argument("--rounds", type=int, default=50)
        command.add_argument("--runs", type=int, default=20, help="seeds to average over, for random sequences")
        command.add_argument("--accelerate", type=int, default=0, metavar="K", help="K Chebyshev steps inside each round")


def topology_from(args, seed=None):
    """The topology of NAME, --peers, --weights and --set; example parameters for what is not set."""
    entry = _entry(args.name)
    params = {**entry.example, **dict(args.params)}
    peers = entry.example_peers if args.peers is None else args.peers
    return build(args.name, peers, weights=args.weights, seed=args.seed if seed is None else seed, **params)


def _entry(name: str):
    if name not in TOPOLOGIES:
        raise ValueError(f"topology {name!r} is not known; known: {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def run_list(args) -> None:
    names = describe()
    print(json.dumps(names, indent=1) if args.json else "\n".join(f"{name:22} {line}" for name, line in names.items()))


def run_compare(args) -> None:
    from topologies.compare import compare, table
    from topologies.predict import Network

    network = Network(args.message, args.bandwidth, args.latency, args.node_size, args.node_bandwidth)
    rows = compare(args.peers, network, args.tolerance, args.names, args.seed)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


def run_describe(args) -> None:
    from topologies.compare import about, facts
    from topologies.files import FILES

    _entry(args.name)
    known = about(args.name)
    needs = [param for param, default in known["parameters"].items() if default == "required"]
    example = {**TOPOLOGIES[args.name].example, **dict(args.params)}
    if args.name not in FILES and set(needs) <= set(example) or args.params:
        known["facts"] = facts(topology_from(args))
    print(json.dumps(known, indent=1) if args.json else _text(known))


def _text(known: dict) -> str:
    lines = [f"{known['name']}: {known['about']}", "", known["documentation"], "", "parameters:"]
    lines += [f"  {name} = {value}" for name, value in known["parameters"].items()] or ["  none"]
    if "facts" in known:
        lines += ["", "here:"]
        lines += [f"  {key:28} {value:.6g}" if isinstance(value, float) else f"  {key:28} {value}"
                  for key, value in known["facts"].items() if value is not None]  # fmt: skip
    return "\n".join(lines)


def run_draw(args) -> None:
    from topologies.draw import draw, save

    print(save(draw(topology_from(args), args.rounds), args.output))


def run_simulate(args) -> None:
    from topologies import spectrum
    from topologies.acceleration import accelerate
    from topologies.predict import rate, simulate

    topology = topology_from(args)
    runs = 1 if topology.period else args.runs
    inner, (predicted, how) = None, rate(topology)
    if args.accelerate:
        if topology.period != 1 or not topology.symmetric:
            raise ValueError(f"--accelerate needs a static symmetric W, and {args.name!r} is not one")
        lam = spectrum.slem(topology)
        predicted = 1.0 / math.cosh(args.accelerate * math.acosh(1.0 / lam)) if lam else 0.0
        how = f"1 / T_{args.accelerate}(1 / SLEM)"

        def inner(entries, x):
            return accelerate(entries.apply, x, args.accelerate, lam)

    result = simulate(lambda seed: topology_from(args, seed), args.rounds, runs, seed=args.seed, inner=inner)
    found = {"name": args.name, "num_peers": topology.num_peers, "runs": runs, "predicted_rate": predicted, "how": how}
    found |= {"measured_rate": result.measured, "exact_after": result.exact_after, "distance": result.distance.tolist()}
    print(json.dumps(found, indent=1) if args.json else _curve(found))


def _curve(found: dict) -> str:
    lines = [f"{found['name']}, {found['num_peers']} peers, {found['runs']} run(s)", "round  |x - mean| / at start"]
    rounds = len(found["distance"]) - 1
    shown = sorted({0, 1, 2, 3, rounds, *range(0, rounds + 1, max(1, rounds // 10))})
    lines += [f"{t:5}  {found['distance'][t]:.3e}" for t in shown if t <= rounds]
    lines.append(f"predicted {found['predicted_rate']:.5f} a round ({found['how']}); measured {found['measured_rate']:.5f}")
    if found["exact_after"] is not None:
        lines.append(f"exact after {found['exact_after']} round(s)")
    return "\n".join(lines)


def run_gallery(args) -> None:
    from topologies.gallery import make

    for path in make(args.output, args.names):
        print(path)


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        globals()[f"run_{args.command}"](args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, ``head`` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
