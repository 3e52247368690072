"""The command: `bash benchmarks/gpu.sh [--device cpu] [--only NAME ...] [--seconds 530] [--output FILE]`."""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import blocked  # noqa: F401 - before anything that imports PEFT
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runner import Report, run_parts
from benchmarks.gpu.setting import Setting

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with small sizes")
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--seconds", type=float, default=530.0, help="for all parts together; what does not fit is not begun")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_DEVICE.json")
    args = parser.parse_args()
    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    output = args.output or RESULTS / f"gpu_{args.device}.json"
    with tempfile.TemporaryDirectory() as folder:
        report = Report(output, " ".join(["bash benchmarks/gpu.sh", *sys.argv[1:]]))
        return run_parts(chosen, Setting(args.device, Path(folder)), report, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
