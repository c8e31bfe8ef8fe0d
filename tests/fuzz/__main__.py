"""Runs one fuzz target for some minutes: python -m tests.fuzz TARGET --minutes 10. Ends with 1 at the first fault."""

from __future__ import annotations

import argparse
import sys
import time

from hypothesis import HealthCheck, seed, settings

from tests.fuzz.targets import TARGETS

EXAMPLES = 200  # a round


def main() -> int:
    """Round after round with another seed each, until the time is up; what failed is shown as small as it gets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each has the next one")
    given = parser.parse_args()
    limits = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    end, rounds = time.monotonic() + 60 * given.minutes, 0
    with TARGETS[given.target]() as target:
        test = limits(target)
        while time.monotonic() < end:
            seed(given.seed + rounds)(test)()
            rounds += 1
    print(f"{given.target}: {rounds * EXAMPLES} examples, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
