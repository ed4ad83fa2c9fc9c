"""Run numbered mutations in child processes.

A mutation that ends, hangs or fills its process is one line of the result.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

SECONDS = 10  # that a mutation may take, of the processor


def campaign(
    command: Sequence[str], mutations: int, batch: int, first: int, bad_kinds: Collection[str]
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Run all mutations in children; return counts, and the bad ones.

    Args:
      command: of a child; the numbers of its first mutation and of the one behind its last are put
        behind it. Of each it prints a line ``{"start": number, "name", "way"}``, and one
        ``{"kind", "why", "seconds"}``.
      mutations: how many.
      batch: how many a child tries.
      first: number of the first.
      bad_kinds: what to return; ``"abort"`` and ``"hang"`` are added by us.

    Returns:
      How many of each kind, and the lines of the bad ones.
    """
    counts, bad, ways, slowest, number = Counter[str](), [], Counter[str](), 0.0, first
    while number < first + mutations:
        last = min(number + batch, first + mutations)
        with subprocess.Popen(
            [*command, str(number), str(last)], stdout=subprocess.PIPE, text=True
        ) as process:
            timer = _Timer(process)
            case: dict[str, Any] = {}
            assert process.stdout is not None
            for line in filter(lambda line: line.startswith("{"), process.stdout):
                told = json.loads(line)
                if "start" in told:
                    case = told
                    number = case["start"] + 1
                    timer.start()
                    continue
                timer.stop()
                slowest = max(slowest, told["seconds"])
                kind = (
                    "hang"
                    if told["seconds"] > SECONDS and told["kind"] not in bad_kinds
                    else told["kind"]
                )
                counts[kind] += 1
                ways[f"{case['way']}: {kind}"] += 1
                if kind in bad_kinds:
                    bad.append({**case, **told, "kind": kind})
                case = {}
        timer.stop()
        if case:
            kind = "hang" if timer.fired else "abort"
            counts[kind] += 1
            ways[f"{case['way']}: {kind}"] += 1
            bad.append({**case, "kind": kind, "why": f"exit code {process.returncode}"})
        elif number < last:
            raise SystemExit("the child ended before its first mutation")
        print(f"{number - first:>6} of {mutations}: {dict(counts)}", file=sys.stderr, flush=True)
    print(f"  the slowest took {slowest:.1f} seconds", file=sys.stderr)
    for way, count in sorted(ways.items()):
        print(f"  {way:<40} {count:>6}", file=sys.stderr)
    return counts, bad


class _Timer:
    """Ends a process that is silent for longer than a mutation takes on a busy machine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.fired, self._timer = process, False, None

    def start(self) -> None:
        self._timer = threading.Timer(12 * SECONDS, self._end)
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.fired = True
        self.process.kill()
