"""A sweep as an array job of Slurm: one task a run."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path("launch/slurm/sweep.sbatch")


def array_command(num_runs: int, sweep: Path, words: Sequence[str], options: Sequence[str], jobs: int | None) -> list[str]:
    """sbatch for the whole sweep; `options` are NAME=VALUE or NAME for sbatch, `jobs` how many runs at a time, `words` go to dfl.

    ValueError without the batch script, which lies in the project's checkout.
    """
    script = next((path for path in (SCRIPT, Path(__file__).parents[2] / SCRIPT) if path.is_file()), None)
    if script is None:
        raise ValueError(f"--slurm needs {SCRIPT} of the project's checkout, below the working directory")
    throttle = "" if jobs is None else f"%{jobs}"
    extra = [f"--{option.lstrip('-')}" for option in options]
    return ["sbatch", f"--array=0-{num_runs - 1}{throttle}", *extra, str(script), str(sweep), *words]


def submit(command: Sequence[str]) -> str:
    """What sbatch says. ValueError where there is no Slurm, OSError where it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ValueError("--slurm: there is no sbatch on this machine; leave it out to run here, or submit where Slurm is") from None
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
