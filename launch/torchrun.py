"""torchrun, whose exit status is that of the processes it started: 75 stopped, 2 refused, 128 + n killed by signal n.

    python launch/torchrun.py --standalone --nproc-per-node 2 -m dfl train my.yaml --resume

torchrun itself exits with 1 whatever happened, after a trace of its own calls. A script that has to know whether a run can go on, as
launch/slurm/train.sbatch, starts it like this. Arguments are torchrun's.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

STOPPED = 75


def status(error: ChildFailedError) -> int:
    """A killed process comes before those that then failed for want of it; SIGTERM is how torchrun itself ends those that are left."""
    for failure in error.failures.values():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return 128 - failure.exitcode
    exitcode = error.get_first_failure()[1].exitcode
    return exitcode if exitcode > 0 else 128 - exitcode


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(status(error))
    except SignalException as error:
        print(f"torchrun: stopped by {error.sigval.name}", file=sys.stderr)
        sys.exit(STOPPED)
