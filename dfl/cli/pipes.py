"""What a command does when nobody reads what it prints, as in `dfl list | head`."""

import os
import select
import stat
import sys
from collections.abc import Callable

# what a shell reports of a program that SIGPIPE has ended
UNREAD = 141


def ends_quietly(run: Callable[[], int]) -> int:
    """The exit status of `run`, or UNREAD where standard output or standard error is a pipe without a reader.

    BrokenPipeError where another pipe is broken.
    """
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends, which would print a complaint
    except SystemExit as error:  # of argparse, which takes no notice of failed writes
        if error.code == 0 and _unread(sys.stdout):
            return UNREAD
        raise
    except BrokenPipeError:
        if any([_unread(sys.stdout), _unread(sys.stderr)]):
            return UNREAD
        raise


def _unread(stream) -> bool:
    """Whether a stream is a pipe that nobody reads; what is still to be written to it goes to /dev/null then."""
    try:
        handle = stream.fileno()
        asked = select.poll()
        asked.register(handle, 0)
        unread = bool(asked.poll(0)) and stat.S_ISFIFO(os.fstat(handle).st_mode)
        if unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        return unread
    except (OSError, ValueError, AttributeError):  # no file at all, as in a notebook
        return False
