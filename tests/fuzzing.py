"""Each kind of file, changed at random, for the function that reads it: a sentence, or what the whole file gives.

A fault is: any exception but InputError, the end of the process, more than SECONDS or MOST_MIB, or, where a checksum
covers the changed bytes, other pixels than those of the whole file. A number and a reader's name give the same file
again: python tests/robustness.py --reader NAME --number N
"""

import gc
import gzip
import importlib
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from commands import limit_memory
from test_robust import GOOD, PICTURE, WITH_CHECKSUM, coco, deflated_dicom, net, nifti, picture, read, written

from data import encode_runs, load_mask, save_mask
from demo_data import tiny_cache
from formats import InputError
from formats.annotations import read_supervisely
from formats.cache import read_index, read_journal
from formats.checkpoints import read_checkpoint, save_checkpoint
from formats.pictures import read_mask
from formats.readers import read_boxed
from formats.truth import read_prediction, read_truth
from formats.writing import save_image, save_npz
from tables import with_times

SECONDS, MOST_MIB = 10, 1536
TIMERS = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: 6 * SECONDS}  # of work, and of waiting
GRANTED = 6  # GiB: a header of 32 bits may ask for 4 that nothing fills
LABELS = np.zeros((64, 80), np.uint16)
LABELS[10:30, 20:50], LABELS[35:60, 5:20] = 1, 2


class Reader(NamedTuple):
    make: Callable[[Path], Path]  # writes a good file into a folder
    read: Callable[[Path], object]
    opened: Callable[[bytes], bytes] | None = None  # unpacks, so that what is packed can be changed, ...
    closed: Callable[[bytes], bytes] | None = None  # ... and packed again, with a new checksum
    covered: Callable[[bytes], int] | None = None  # from which byte on a checksum covers the file


# ---------------------------------------------------------------- good files


def supervisely(folder: Path) -> Path:
    save_image(folder / "US_a.png", PICTURE)
    points = {"exterior": [[5, 5], [40, 5], [40, 30]], "interior": [[[10, 8], [12, 8], [12, 10]]]}
    objects = [
        {"classTitle": "a", "points": points},
        {"classTitle": "b", "points": {"exterior": [[3, 4], [23, 4], [9, 24]]}},
    ]
    content = {"size": {"height": 64, "width": 80}, "objects": objects}
    return written(folder / "US_a.png.json", json.dumps(content).encode())


def coco_file(folder: Path, counts=None, **fields) -> Path:
    return coco(counts or [500, 20, 44, 30, 5120 - 594], **fields)(folder).with_name("a.json")


def polygon_file(folder: Path) -> Path:
    return coco_file(folder, segmentation=[[5, 5, 40, 5, 40, 30], [50, 40, 60, 40, 60, 60]], bbox=[5, 5, 55, 55])


def boxes_file(folder: Path) -> Path:
    picture(folder, "US_a.png")
    return written(folder / "boxes.csv", b"file,x0,y0,x1,y1,label\nUS_a.png,1,2,30,40,one\nUS_a.png,5,5,60,50,two\n")


def mask_picture(folder: Path) -> Path:
    save_image(folder / "US_a_mask.png", LABELS.astype(np.uint8))
    return folder / "US_a_mask.png"


def our_mask(folder: Path) -> Path:
    save_mask(folder / "a.pkl", encode_runs(LABELS), LABELS.shape)
    return folder / "a.pkl"


def released_mask(folder: Path) -> Path:
    runs = [(int(start) + 1, np.int64(length), np.uint8(value)) for start, length, value in encode_runs(LABELS)]
    return written(folder / "a.pkl", pickle.dumps(runs))


def checkpoint(folder: Path) -> Path:
    save_checkpoint(folder / "a.pt", {"model": net(), "preset": "fixed", "step": 3})
    return folder / "a.pt"


def truth_file(folder: Path) -> Path:
    volume = np.stack([LABELS] * 3)
    save_npz(
        folder / "3D_CT_a.npz", gts=volume, segs=volume, spacing=np.array([1.0, 1, 2]), boxes=[[20, 10, 0, 49, 29, 2]]
    )
    return folder / "3D_CT_a.npz"


def times_file(folder: Path) -> Path:
    return written(
        folder / "efficiency.csv", b"case,modality,boxes_are,total_s\na.npz,CT,exact,1.5\nb.npz,MR,drawn,0.25\n"
    )


def cache_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tiny_cache(folder)
        return written(folder / name, CACHE_LINE) if name == "journal.jsonl" else folder / name

    return make


CACHE_LINE = json.dumps({
    "name": "a", "stamp": "s", "objects": 1, "empty": 0, "lost": 0, "small": 0,
    "entries": [dict(name="a", modality="CT", submodality="CT", patient="a", source="a", height=9, width=9, split="", objects=1)],
}).encode()  # fmt: skip


def read_times(path: Path):
    return with_times([{"system": "a", "case": "a.npz"}], {"a": path.parent})[0]["seconds"]


def read_pixels(path: Path):
    found = read_checkpoint(path)
    return found["model"]["a.weight"].numpy() if isinstance(found.get("model"), dict) else 0


# ---------------------------------------------------------------- packed formats


def zip_opened(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return b"".join(struct.pack("<I", len(data := file.read(name))) + data for name in sorted(file.namelist()))


def zip_closed(content: bytes) -> bytes:
    buffer, at, names = io.BytesIO(), 0, iter(("boxes.npy", "gts.npy", "imgs.npy", "segs.npy"))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        while at + 4 <= len(content) and (name := next(names, None)):
            size = struct.unpack("<I", content[at : at + 4])[0]
            file.writestr(name, content[at + 4 : at + 4 + size])
            at += 4 + size
    return buffer.getvalue()


def dicom_opened(content: bytes) -> bytes:
    start = 144 + struct.unpack("<I", content[140:144])[0]
    return content[:start] + zlib.decompress(content[start:], -zlib.MAX_WBITS)


def dicom_closed(content: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = 144 + int.from_bytes(content[140:144], "little") % 4096
    return content[:start] + packer.compress(content[start:]) + packer.flush()


def npz_of_case(folder: Path) -> Path:
    save_npz(folder / "2DBox_a.npz", imgs=PICTURE, gts=LABELS, boxes=[[1, 2, 30, 40]])
    return folder / "2DBox_a.npz"


def end_of_header(content: bytes) -> int:
    """Where the packed voxels of a MetaImage, an NRRD or a TIFF begin: a checksum covers them, and nothing before."""
    if content[:4] == b"II*\0":
        import tifffile

        with tifffile.TiffFile(io.BytesIO(content)) as file:
            places = [
                (at, at + size) for p in file.pages for at, size in zip(p.dataoffsets, p.databytecounts, strict=True)
            ]
        return max(places)[0]
    return re.search(rb"\n\n|LOCAL\n", content).end()


READERS: dict[str, Reader] = {
    **{
        name: Reader(make, read, covered=(lambda _: 0) if name in ("NIfTI, gzip", "PNG", "npz") else
                     end_of_header if name in WITH_CHECKSUM else None)
        for name, make in GOOD.items()
    },
    "NIfTI inside gzip": Reader(nifti, read, gzip.decompress, lambda content: gzip.compress(content, 1)),
    "npz inside zip": Reader(npz_of_case, read_boxed, zip_opened, zip_closed),
    "DICOM inside deflate": Reader(deflated_dicom, read, dicom_opened, dicom_closed),
    "mask PNG": Reader(mask_picture, read_mask, covered=lambda _: 0),
    "COCO, runs": Reader(coco_file, lambda path: read_boxed(path.with_name("US_a.png"), looseness=0.0).labels),
    "COCO, polygons": Reader(polygon_file, lambda path: read_boxed(path.with_name("US_a.png")).boxes),
    "Supervisely": Reader(supervisely, lambda path: read_supervisely(path, (64, 80))[0]),
    "boxes.csv": Reader(boxes_file, lambda path: read_boxed(path.with_name("US_a.png")).boxes),
    "PKL": Reader(our_mask, lambda path: load_mask(path, LABELS.shape)),
    "PKL, released": Reader(released_mask, lambda path: load_mask(path, LABELS.shape)),
    "checkpoint": Reader(checkpoint, read_pixels),
    "truth": Reader(truth_file, lambda path: read_truth(path).labels, covered=lambda _: 0),
    "prediction": Reader(truth_file, lambda path: read_prediction(path, TRUTH), covered=lambda _: 0),
    "efficiency.csv": Reader(times_file, read_times),
    "index.csv": Reader(cache_file("index.csv"), lambda path: len(read_index(path.parent))),
    "version.json": Reader(cache_file("version.json"), lambda path: len(read_index(path.parent))),
    "journal": Reader(cache_file("journal.jsonl"), lambda path: len(read_journal(path.parent))),
}  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    TRUTH = read_truth(truth_file(Path(folder)))


# ---------------------------------------------------------------- how a file is changed

EXTREMES = [0, 1, 2**7, 2**8 - 1, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
FLOATS = [np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-308, 0.0, -0.0, 1e38, -1.0]
TEXTS = (
    b"-1", b"0", b"99999999999999999999", b"nan", b"inf", b"-inf", b"1e308", b"%s%s%n", b"", b"null", b"[]", b"{}", b'""', b"true",
    b"/etc/passwd", b"../../x", b"\xff\xfe", b"\0", b"\x1b[2J", b"2147483648", b"4294967296", b"9" * 400, b"LIST", b'"', b",", b"\n\n",
)  # fmt: skip


def flip(content: bytearray, rng: np.random.Generator, end: int) -> None:
    for at in rng.integers(0, len(content), rng.integers(1, 9)):
        content[at] ^= 1 << rng.integers(8)


def cut(content: bytearray, rng: np.random.Generator, end: int) -> None:
    del content[rng.integers(len(content)) :]


def insert(content: bytearray, rng: np.random.Generator, end: int) -> None:
    at = rng.integers(len(content))
    content[at:at] = rng.bytes(rng.integers(1, 20))


def remove(content: bytearray, rng: np.random.Generator, end: int) -> None:
    at = rng.integers(len(content))
    del content[at : at + rng.integers(1, 20)]


def repeat(content: bytearray, rng: np.random.Generator, end: int) -> None:
    start, at = rng.integers(0, len(content), 2)
    content[at:at] = content[start : start + rng.integers(1, 200)]


def extreme(content: bytearray, rng: np.random.Generator, end: int) -> None:
    """A number of a header, where most fields are, becomes the least, the most, or none."""
    for _ in range(rng.integers(1, 3)):
        size = int(2 ** rng.integers(4))
        at = int(rng.integers(end))
        if size >= 4 and rng.random() < 0.3:
            value = struct.pack(
                "<f" if size == 4 else "<d", np.float32(rng.choice(FLOATS)) if size == 4 else rng.choice(FLOATS)
            )
        else:
            value = int(EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * size)).to_bytes(
                size, "little" if rng.random() < 0.7 else "big"
            )
        content[at : at + size] = value


def word(content: bytearray, rng: np.random.Generator, end: int) -> None:
    """A number or a word of a text becomes what no program expects there."""
    places = list(re.finditer(rb"-?[\w.]+", content[:end]))
    if places:
        found = places[rng.integers(len(places))]
        content[found.start() : found.end()] = TEXTS[rng.integers(len(TEXTS))]


CHANGES = (flip, cut, insert, remove, repeat, extreme, word)


def changed(reader: Reader, good: bytes, name: str, number: int) -> tuple[bytes, bool]:
    """-> the good file's bytes, changed; whether a checksum covers every change"""
    rng = np.random.default_rng((zlib.crc32(name.encode()), number))
    content, start = bytearray(reader.opened(good) if reader.opened else good), 0
    start = reader.covered(good) if reader.covered else 0
    kept, content = content[:start], content[start:]
    change = CHANGES[rng.integers(len(CHANGES))]
    if reader.covered and start and rng.random() < 0.5:  # its header is changed, which no checksum covers
        end = len(kept)
        change(kept, rng, end)
        return bytes(kept + content), False
    change(content, rng, min(len(content), 512))
    content = bytes(kept + content)
    return (reader.closed(content) if reader.closed else content), reader.covered is not None


# ---------------------------------------------------------------- the run


def forget() -> None:
    """What the readers keep of a file that they have read before: two changes may fall into one tick of the clock."""
    for name in ("annotations", "readers", "partners"):
        for function in vars(importlib.import_module(f"formats.{name}")).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def value_of(found) -> bytes:
    return np.ascontiguousarray(found).tobytes()


def attempt(reader: Reader, path: Path, content: bytes, pixels: bytes | None) -> str:
    """Read one file. -> what is wrong, or "".   pixels: what it must give if it is read."""
    path.write_bytes(content)
    forget()
    try:
        found = value_of(reader.read(path))
    except InputError:
        return ""
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [
            frame for frame in where if "site-packages" not in frame.filename and "/lib/python" not in frame.filename
        ]
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"
    return "other pixels than the whole file" if pixels is not None and found != pixels else ""


def fuzz(name: str, numbers: range) -> tuple[int, list[tuple[int, str]]]:
    """-> how many files were read, [(number, what is wrong)]"""
    reader, faults, next_one = READERS[name], [], numbers.start
    with tempfile.TemporaryDirectory() as folder:
        path = reader.make(Path(folder))
        good = path.read_bytes()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            pixels = value_of(reader.read(path))
        while next_one < numbers.stop:
            here, there = os.pipe()
            if not (child := os.fork()):
                try:
                    _read_many(reader, path, good, pixels, name, range(next_one, numbers.stop), there)
                except BaseException as error:
                    os.write(there, f"fault of this program: {error!r}\n".encode())
                os._exit(0)
            os.close(there)
            with os.fdopen(here, encoding="utf-8", errors="replace") as pipe:
                for line in pipe:
                    kind, _, text = line.rstrip("\n").partition(" ")
                    if kind == "at":
                        next_one = int(text)
                    else:
                        faults.append((next_one, text))
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                died = signal.Signals(os.WTERMSIG(status))
                faults.append(
                    (
                        next_one,
                        f"more than {SECONDS} s"
                        if died in (signal.SIGALRM, signal.SIGPROF)
                        else f"died of {died.name}",
                    )
                )
            next_one += 1
    return len(numbers), faults


def _read_many(reader: Reader, path: Path, good: bytes, pixels: bytes, name: str, numbers: range, there: int) -> None:
    """In a fork, which ends after the last one, or after one that took too much memory."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    sys.stdout = sys.stderr = io.StringIO()
    limit_memory(GRANTED * 2**30)
    torch.set_num_threads(1)
    gc.freeze()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        os.write(there, f"at {number}\n".encode())
        content, is_covered = changed(reader, good, name, number)
        for timer, most in TIMERS.items():
            signal.setitimer(timer, most)
        wrong = attempt(reader, path, content, pixels if is_covered else None)
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        if mib > MOST_MIB:
            wrong = wrong or f"held {mib} MiB"
        if wrong:
            os.write(there, f"fault {' '.join(wrong.split())}\n".encode(errors="replace"))
        if mib > MOST_MIB:
            return
        if number % 1000 == 0:
            sys.stdout.seek(0), sys.stdout.truncate()


def again(name: str, number: int, folder: Path) -> str:
    """Write the changed file of a number into a folder, read it there in this process. -> what is wrong, or "nothing" """
    folder.mkdir(parents=True, exist_ok=True)
    path = READERS[name].make(folder)
    good, pixels = path.read_bytes(), value_of(READERS[name].read(path))
    content, is_covered = changed(READERS[name], good, name, number)
    return f"{path}: {attempt(READERS[name], path, content, pixels if is_covered else None) or 'nothing'}"
