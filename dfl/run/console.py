"""What a run prints of its rounds."""

import sys
import time

from tqdm import tqdm

from dfl.report.lines import clock


class Console:
    """A progress bar with the time left on a terminal, plain lines otherwise."""

    def __init__(self, rounds: int, done: int = 0, stream=None, quiet: bool = False):
        """quiet: another process prints."""
        self.quiet = quiet
        self.stream, self.rounds, self.started, self.first = stream or sys.stderr, rounds, time.monotonic(), done
        self.bar = tqdm(total=rounds, initial=done, file=self.stream, unit="round", dynamic_ncols=True) \
            if self.stream.isatty() and not quiet else None

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def round(self, t: int, text: str, important: bool, evaluation: str = "") -> None:
        """One round is done. An evaluation stays on the screen, above the bar. Plain logs get a line when `important`, or at least
        every fifth of the run."""
        if self.quiet:
            return
        if self.bar:
            if evaluation:
                self.say(f"round {t + 1}/{self.rounds}  {evaluation}")
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif important or (t + 1) % max(1, self.rounds // 5) == 0:
            left = (time.monotonic() - self.started) / (t + 1 - self.first) * (self.rounds - t - 1)
            self.say("  ".join(part for part in (f"round {t + 1}/{self.rounds}", text, evaluation, f"left {clock(left)}") if part))

    def close(self) -> None:
        if self.bar:
            self.bar.close()
