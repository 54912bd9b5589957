"""What a run writes: files, each whole or not at all; on the screen a progress bar, messages, how it ended."""

import csv
import importlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from formats import InputError


def save_bytes(path: Path, content: bytes) -> int:
    """Write a file whole or not at all, and its folder if need be. -> the number of bytes. OSError if that can't be done.

    The content first goes into a file NAME.xxxxxxxx.tmp, which is then renamed. Its name is random, because two machines
    may write one file at the same time: the later one stays. A process that is killed leaves its .tmp file behind.
    """
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return len(content)


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Compressed .npz of plain arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    save_bytes(path, buffer.getvalue())


def save_text(path: Path, text: str) -> None:
    """UTF-8 text with Unix line ends on every system."""
    save_bytes(path, text.encode(errors="backslashreplace"))  # the name of a case may not be UTF-8


def save_json(path: Path, content: dict) -> None:
    """Indented JSON; paths are written as strings."""
    save_text(path, json.dumps(content, indent=2, default=str) + "\n")


def csv_text(rows: list[dict], columns: tuple[str, ...], number: str = ".6f") -> str:
    """Rows as CSV; a missing value or nan stays blank.   number: format of floats, "" for all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        writer.writerow([("" if math.isnan(c) else f"{c:{number}}") if isinstance(c, float) else c for c in cells])
    return text.getvalue()


def save_image(path: Path, image: np.ndarray) -> int:
    """PNG of (H, W) uint8 or uint16, or (H, W, 3) RGB uint8. -> bytes written"""
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    # OpenCV's default filter and level: by far its fastest, and files within 5 % of the smallest
    return save_bytes(path, cv2.imencode(".png", pixels)[1].tobytes())


def save_figure(path: Path, figure) -> None:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    save_bytes(path, buffer.getvalue())


# ---------------------------------------------------------------- progress, messages, the end of a script


@contextmanager
def script(name: str, args=None, smoke: str = "", advice: str = "") -> Iterator[Path]:
    """What a script runs in: a temporary folder. Bad input, or a full disk, ends it with one sentence.

    smoke : "module:function" that --smoke calls with the arguments, to change them, and the folder.
    advice : what to do about an error that the system told.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            if smoke and args.smoke:
                module, function = smoke.split(":")
                getattr(importlib.import_module(module), function)(args, Path(folder))
            yield Path(folder)
    except (InputError, OSError) as error:
        sys.exit(f"{name}: {error}{advice * isinstance(error, OSError)}")


def progress(iterable: Iterable, what: str, total: int | None = None, unit: str = "it", **options) -> Iterable:
    """Go through an iterable and show a bar, if somebody can see it.   what : words before it.   options : tqdm's."""
    # importing tqdm takes as long as reading and writing a small image
    seen = sys.stderr.isatty() or someone_is_there()
    return progress_bar(iterable, what, total, unit, **options) if seen else iterable


def progress_bar(iterable: Iterable | None, what: str, total: int | None = None, unit: str = "it", **options):
    """tqdm's bar object, which can show a text. If iterable is None, the caller calls its `update`."""
    from tqdm import tqdm as bar

    if someone_is_there():
        from tqdm.notebook import tqdm as bar  # needs Jupyter's widgets
    elif not sys.stderr.isatty():
        options["disable"] = True
    return bar(iterable, desc=what, total=total, unit=unit, **options)


def tell(text: str, error: bool = False) -> None:
    """Print a line on stdout, or an error on stderr, without breaking a progress bar."""
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    write(text, file=sys.stderr if error else sys.stdout)


def someone_is_there() -> bool:
    """True if a person works in a Jupyter page, False if a program runs the notebook.

    Only the page can answer `input()`. The program gets no bar, so that every run commits the same output.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    return kernel is not None and bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
