"""A bar that says how long a step still takes, by tqdm: on a terminal, and in Jupyter when somebody looks on.

It is silent in a log, in CI, and where a program runs a notebook: what is committed then stays the same from run to run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable: Iterable | None, what: str, total: int | None = None, unit: str = "it", **options):
    """tqdm's bar round an iterable, or with None one to be moved by hand.   what: the words before it.   options: tqdm's own."""
    bar = tqdm
    if someone_is_there():
        from tqdm.notebook import tqdm as bar  # only here: it needs Jupyter's widgets
    elif not sys.stderr.isatty():
        options["disable"] = True
    return bar(iterable, desc=what, total=total, unit=unit, **options)


def someone_is_there() -> bool:
    """True if a person looks on in Jupyter: the program that asked for this cell's run can answer questions, as its pages can."""
    if "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
