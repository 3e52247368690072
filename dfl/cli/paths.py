"""Paths on the command line."""

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """For `type=` of an argument: `Path("")` would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; give the path of a file or folder")
    return Path(text)
