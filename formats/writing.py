"""What a run writes: files, each whole or not at all; on the screen a progress bar, messages, how it ended."""

import csv
import errno
import importlib
import io
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from formats import InputError, printable

# Text cells that a spreadsheet may run, and those that would be taken for one that was mended; numbers are none
RISKY = re.compile(r"(?![-+]?[\d.]+(e[-+]?\d+)?$)[-=+@'\x00-\x1f\x7f]")
SHOWN = 50  # letters of a file's name that its temporary one keeps, at most 200 bytes


def save_bytes(path: Path, content: bytes) -> int:
    """Write a file whole or not at all, and its folder if need be. -> the number of bytes. OSError if that can't be done.

    The content first goes into a file NAME.xxxxxxxx.tmp, which is then renamed. Its name is random, because two machines
    may write one file at the same time: the later one stays. A process that is killed leaves its .tmp file behind, which
    `one_run` removes. InputError for a name that is too long.
    """
    # cut, so that a name fits as long as the file's own does
    partial = path.with_name(f"{path.name[:SHOWN]}.{os.urandom(4).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{path}: this name is too long for the disk; give the case a shorter one") from error
        if path.is_dir():
            raise InputError(f"{path}: a folder stands where this file should be; move it away") from error
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
    """Rows as CSV; a missing value or nan stays blank.   number: format of floats, "" for all digits.

    A spreadsheet runs text that begins with = + - or @: it gets an apostrophe in front, which `csv_cell` takes away again.
    """
    lines = []
    # with \r\n at its ends, csv puts a cell that holds one of the two in quotation marks
    writer = csv.writer(SimpleNamespace(write=lambda line: lines.append(line[:-2])))
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        cells = [("" if math.isnan(c) else f"{c:{number}}") if isinstance(c, float) else c for c in cells]
        writer.writerow([f"'{c}" if isinstance(c, str) and RISKY.match(c) else c for c in cells])
    return "\n".join([*lines, ""])


def csv_cell(text: str) -> str:
    """The text that `csv_text` made a cell of.

    >>> csv_cell("'=1+1"), csv_cell("US_1")
    ('=1+1', 'US_1')
    """
    return text.removeprefix("'")


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


# ---------------------------------------------------------------- one run at a time


def check_folder(folder: Path) -> None:
    """InputError if a file stands where an output folder should be, or one above it."""
    if in_the_way := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise InputError(f"{folder}: {in_the_way} is a file, so no folder can be made there; name another")


@contextmanager
def one_run(folder: Path, *below: str, file: str = "") -> Iterator[None]:
    """Hold an output folder, made if need be, while a run writes there. InputError that says who else holds it.

    below : folders in it that the run writes to as well.   file : hold only the files whose names begin so.
    What a killed run has left there is removed: its .tmp files. An empty folder that was made goes again.
    """
    check_folder(folder)
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts the first one writes
        yield
        return
    is_new, lock = not folder.exists(), folder / f"{file}.lock"
    folder.mkdir(parents=True, exist_ok=True)
    held = _locked(lock)
    try:
        for path in (path for name in ("", *below) for path in (folder / name).glob("*.tmp")):
            if re.search(r"\.[0-9a-f]{8}\.tmp$", path.name) and path.name.startswith(file[:SHOWN]):
                with suppress(OSError):
                    path.unlink()
        yield
    finally:
        # Windows removes no open file; elsewhere, after closing, the file may be another run's
        for end in (held.close, lock.unlink) if os.name == "nt" else (lock.unlink, held.close):
            with suppress(OSError):
                end()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _locked(path: Path) -> io.TextIOWrapper:
    """The file, locked by this process. The system's own lock: it ends with its process, however that ends, so that no
    number of a dead process, or of its successor, has to be judged; and forked workers do not keep it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(2**30)  # not the text, which others could then not read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                file.seek(0)
                who = file.read(100) or "another process"
                file.close()
                told = f"{who} is writing here; wait for it, or name another folder"
                raise InputError(f"{path.parent}: {told}") from error
            tell(f"{path.parent}: this disk has no locks ({error.strerror}): start no second run there", error=True)
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its holder has just removed it
                file.truncate(0)
                file.write(f"process {os.getpid()} of {platform.node()}")
                file.flush()
                return file
        file.close()


# ---------------------------------------------------------------- progress, messages, the end of a script


class Ended(BaseException):
    """Another program asks this one to end. No error of a case, so that no loop over cases goes on."""


def _end(*_) -> None:
    raise Ended("asked to end")


@contextmanager
def script(name: str, args=None, smoke: str = "", advice: str = "") -> Iterator[Path]:
    """What a script runs in: a temporary folder. Bad input, or a full disk, ends it with one sentence.

    smoke : "module:function" that --smoke calls with the arguments, to change them, and the folder.
    advice : what to do about an error that the system told.
    """
    if threading.current_thread() is threading.main_thread():
        # else a program that asks this one to end would leave the folder behind
        signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if smoke and args.smoke:
                module, function = smoke.split(":")
                getattr(importlib.import_module(module), function)(args, Path(folder))
            yield Path(folder)
    except (InputError, OSError, Ended) as error:
        sys.exit(f"{name}: {InputError(f'{error}{advice * isinstance(error, OSError)}')}")


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
    return bar(iterable, desc=printable(what), total=total, unit=unit, **options)


def tell(text: str, error: bool = False) -> None:
    """Print lines on stdout, or an error on stderr, without breaking a progress bar. Nothing in them moves the cursor."""
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    write("\n".join(map(printable, text.split("\n"))), file=sys.stderr if error else sys.stdout)


def someone_is_there() -> bool:
    """True if a person works in a Jupyter page, False if a program runs the notebook.

    Only the page can answer `input()`. The program gets no bar, so that every run commits the same output.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    return kernel is not None and bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
