"""Runs one engine in its own process: generates on request and reports the time of each stage.

``python -m fewstep.bench.worker SPEC`` reads one JSON object per line from standard input, generates a batch
and answers with one line. It waits without using the processor while another engine runs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from fewstep.bench.engines import Engine, Spec, find
from fewstep.bench.timer import StageTimer, cuda


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss starts at the parent's value
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer requests until standard input ends."""
    arguments = json.loads(sys.argv[1])
    started, spec = arguments.pop("started"), Spec(**arguments)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to standard output
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        engine = engine or find(spec.engine)(spec)
        timer = StageTimer()
        begin = time.perf_counter()
        images = engine.generate(request["prompt"], request["seeds"], timer)
        timer.seconds["whole"] = time.perf_counter() - begin
        if request.get("save"):
            import numpy as np

            np.save(request["save"], images)
        answer = {
            "seconds": timer.seconds,
            "peak": peak_memory(),
            "device_peak": used.max_memory_allocated() if (used := cuda()) else 0,
            "since": time.time() - started,
            **asdict(engine.info),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
