"""Imported first by the command: packages that ask for the GPU when PEFT imports them, after which no fork of the process could use
it, are not found here."""

import sys

sys.modules |= dict.fromkeys(("bitsandbytes", "torchao"))
