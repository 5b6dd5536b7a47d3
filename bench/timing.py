"""Times of calls on a GPU, for the benchmarks of this folder, and the command that took them."""

import math
import pathlib
import shlex
import statistics
import sys

import torch

SAMPLE_MILLISECONDS = 20.0
MOST_RUNS = 500


def own_command():
    """The command line of this process, but for where results went to and the command lay, which says nothing about them."""
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        if word in ("--out", "--binary"):
            next(words, None)
        elif not word.startswith(("--out=", "--binary=")):
            kept.append(word)
    return shlex.join(["python3", f"bench/{pathlib.Path(sys.argv[0]).name}", *kept])


def milliseconds(call, runs=1):
    """The mean time of some runs back to back, between two events on the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / runs


class Sampled:
    """A call that is timed once a round."""

    def __init__(self, call):
        self.call = call
        self.runs, self.samples = 0, []

    def sample(self):
        """Adds a sample, after as many untimed runs: a GPU clocks by what ran just before."""
        if self.runs == 0:
            self.call()
            torch.cuda.synchronize()
            self.runs = min(MOST_RUNS, max(1, math.ceil(SAMPLE_MILLISECONDS / milliseconds(self.call))))
        milliseconds(self.call, self.runs)
        self.samples.append(milliseconds(self.call, self.runs))

    def median(self):
        return statistics.median(self.samples)
