"""The parts in their order: the ten checks, then figures. Limits are for a GPU; together they are more than there is time for, since
most parts end long before theirs."""

from benchmarks.gpu import checks, four_bits, speed, together
from benchmarks.gpu.runner import Part

PARTS = [
    Part("versions", 40, checks.versions),
    Part("linear_algebra", 40, checks.linear_algebra),
    Part("rules", 40, checks.rules),
    Part("codecs", 30, checks.codecs),
    Part("tiny_runs", 70, checks.whole_runs),
    Part("resume", 40, checks.resume),
    Part("two_processes", 50, together.two_processes),
    Part("nccl", 80, together.nccl),
    Part("leaving", 50, together.leaving),
    Part("waits", 40, checks.waits),
    Part("qr", 40, speed.qr),
    Part("executors", 60, speed.executors),
    Part("mixing", 80, speed.mixing),
    Part("exchange", 60, together.exchange),
    Part("overlap", 50, together.overlap),
    Part("recipe", 60, speed.recipe),
    Part("llama", 90, speed.llama_part),
    Part("compile", 80, speed.compiled),
    Part("four_bits", 90, four_bits.four_bits),
    Part("tests", 60, checks.tests),
]
