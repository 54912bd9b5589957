"""A bar that says how long a step still takes, by tqdm: on a terminal, and in Jupyter when somebody looks on.

It is silent in a log, in CI, and where a program runs a notebook: what is committed then stays the same from run to run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable


def progress(iterable: Iterable, what: str, total: int | None = None, unit: str = "it", **options) -> Iterable:
    """An iterable in a bar, where somebody looks on.   what: the words before the bar.   options: tqdm's own."""
    if not sys.stderr.isatty() and not someone_is_there():
        return iterable  # tqdm takes as long to import as a small image to be read and written
    return progress_bar(iterable, what, total, unit, **options)


def progress_bar(iterable: Iterable | None, what: str, total: int | None = None, unit: str = "it", **options):
    """The same as tqdm's object, which can be given a text or, with None, be moved by hand."""
    from tqdm import tqdm as bar

    if someone_is_there():
        from tqdm.notebook import tqdm as bar  # only here: it needs Jupyter's widgets
    elif not sys.stderr.isatty():
        options["disable"] = True
    return bar(iterable, desc=what, total=total, unit=unit, **options)


def tell(text: str, error: bool = False) -> None:
    """A line on stdout, or for what went wrong on stderr, that breaks no bar."""
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    write(text, file=sys.stderr if error else sys.stdout)


def someone_is_there() -> bool:
    """True if a person looks on in Jupyter: the program that asked for this cell's run can answer questions, as its pages can."""
    if "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
