"""Step 4 in a process of its own, with a clock for each stage; processes.py starts it. Only the standard library is imported here.

    python benchmarks/processes_child.py MARKS.json ARGUMENTS OF 04_infer.py

Time inside a stage that another stage takes counts for the inner one. Imports are a stage wherever they happen.
"""

import builtins
import importlib
import json
import math
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

FIRST_LINE = time.time()  # since 1970, as the parent's clock: the difference is how long Python took to start
# stage -> what is timed as it, "module:function"; of modules that the engine imports in any case
WRAPPED = {
    "read case": ("04_infer:read_boxed",),
    "read and hash weights": (
        "files.checkpoints:read_checkpoint", "fast.engines:same_file", "fast.engines:same_code", "fast.engines:static_info",
        "fast.engines:compiled_of",
    ),
    "build network": ("segment:load_network", "fast.torch_engine:fast_engine"),
    "load graphs": ("fast.openvino_engine:OpenVINOEngine.__init__",),
    "segment": ("04_infer:segment_objects",),
    "write": ("04_infer:infer_case",),
}  # fmt: skip
MODULES = {  # engine -> modules that it brings, besides 04_infer
    "torch": ("model",),
    "fast": ("fast.engines", "fast.torch_engine"),
    "openvino": ("fast.engines",),
    "openvino-int8": ("fast.engines",),
}


class Clock:
    """Seconds of each stage. Stages may lie in one another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Books the time since the last switch for the innermost stage."""
        now = time.perf_counter()
        self.seconds[self.open[-1] if self.open else "other"] += now - self.since
        self.since = now

    def timed(self, stage: str, function):
        """The function, with its time booked for a stage."""

        def wrapper(*args, **kwargs):
            self.switch()
            self.open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()

        return wrapper


def peak_mb() -> float:
    """The most memory that this process held so far, libraries included, in 10^6 bytes; nan where the system does not say."""
    status = Path("/proc/self/status")  # of Linux. What its parent held does not count here, as it does for `wait4`
    held = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(held[1]) * 1024 / 1e6 if held else math.nan


def run_timed(argv: list[str]) -> None:
    """argv: where the marks go, then the arguments of 04_infer.py."""
    marks, arguments = Path(argv[0]), argv[1:]
    engine = arguments[arguments.index("--engine") + 1]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only
    clock = Clock()
    builtins.__import__ = clock.timed("imports", builtins.__import__)
    load = clock.timed("imports", importlib.import_module)
    modules = {name: load(name) for name in ("04_infer", *MODULES[engine])}
    for stage, places in WRAPPED.items():
        for place in places:
            name, _, attribute = place.partition(":")
            owner = modules.get(name) or sys.modules.get(name)
            for part in attribute.split(".")[:-1]:
                owner = owner and getattr(owner, part)
            if owner is not None:
                last = attribute.split(".")[-1]
                setattr(owner, last, clock.timed(stage, getattr(owner, last)))
    modules["04_infer"].main(arguments)
    clock.switch()
    found = {"first_line": FIRST_LINE, "seconds": clock.seconds, "peak_mb": peak_mb(), "end": time.time()}
    marks.write_text(json.dumps(found))


if __name__ == "__main__":
    run_timed(sys.argv[1:])
