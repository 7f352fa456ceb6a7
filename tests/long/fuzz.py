"""A long run of the fuzzers: ``python -m tests.long.fuzz --inputs 1000000``.

Prints how many inputs each of them got and how fast. Ends at the first finding, with the seed and
the number of the input that made it: ``--only NAME --seed SEED`` runs the same again.
"""

import argparse
import faulthandler
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzzers

SHARES = {"payload": 0.3, "envelope": 0.2, "table": 0.1, "call": 0.2, "file": 0.2}
_SLACK_NBYTES = 3 << 30
_HANG_S = 60


def run(name, n_inputs, seed):
    """Feed so many inputs to one fuzzer; return what to print about it."""
    fuzzer = getattr(fuzzers, f"{name.capitalize()}Fuzzer")()
    rng = random.Random(f"{name} {seed}")
    start = time.monotonic()
    for n in range(n_inputs):
        if n % 1000 == 0:
            faulthandler.dump_traceback_later(_HANG_S, exit=True)
        try:
            fuzzer.one(rng)
        except BaseException as error:
            error.add_note(f"input {n} of --only {name} --seed {seed}")
            raise
    if hasattr(fuzzer, "close"):
        fuzzer.close()
    faulthandler.cancel_dump_traceback_later()
    took_s = time.monotonic() - start
    extra = {k: v for k, v in vars(fuzzer).items() if k in ("n_accepted", "n_quarantined")}
    return f"{name}: {n_inputs} inputs in {took_s:.0f} s, {extra}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SHARES)
    arguments = parser.parse_args()
    # A mutated pickle may ask for any amount of memory.
    resource.setrlimit(resource.RLIMIT_DATA, (_SLACK_NBYTES, resource.RLIM_INFINITY))
    total = 0
    for name, share in SHARES.items():
        if arguments.only in (None, name):
            n_inputs = arguments.inputs if arguments.only else round(arguments.inputs * share)
            print(run(name, n_inputs, arguments.seed), flush=True)
            total += n_inputs
    print(f"{total} inputs, no finding")


if __name__ == "__main__":
    main()
