"""What step 1 reads: one case's files, the options that change what becomes of them, and which shard they belong to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from files import InputError, bare_name, patient_of, person_of
from files.case import Case
from files.formats import ending_of, read_case, read_pair
from files.intensity import parse_window
from files.npz import load_npz, write_case
from files.objects import instances_of, without_labels, without_small
from files.partners import label_files
from grid import promptable_labels


@dataclass(frozen=True, slots=True)
class Options:
    """What may be done to a case before it is cached. Other options give other images: they are part of the stamp."""

    window: str = ""  # NAME or WIDTH/LEVEL, "" for the file's own
    dropped: tuple[int, ...] = ()  # labels that become background
    instances: bool = False  # each connected part of a label becomes an object of its own
    smallest: int = 0  # objects of fewer pixels (2D) or voxels (3D), at the original size, become background

    def checked(self) -> Options:
        """The same. InputError, before any file is read, if the window is none."""
        try:
            parse_window(self.window or "soft")
        except ValueError as error:
            raise InputError(f"--{error}") from error
        return self

    def __str__(self) -> str:
        return f"window {self.window or '-'} dropped {self.dropped} instances {self.instances} smallest {self.smallest}"


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read, or an image and its labels."""

    name: str  # of the case
    path: Path
    labels: Path | None
    is_val: bool = False
    options: Options = Options()

    def stamp(self) -> str:
        """Tells the file from another or a changed one of the same name, and from the same one read in another way.

        Without the folders above the last: on a shared disk they have another name on each machine.
        """
        if self.labels:
            labels = [self.labels]
        else:
            labels = [] if ending_of(self.path) == ".npz" else label_files(self.path)
        files = []
        for path in (self.path, *labels):
            found = path.stat()
            files.append(f"{path.parent.name}/{path.name} {found.st_size} {found.st_mtime_ns}")
        return " ".join([*files, "|", str(self.options)])


def read_source(source: Source) -> tuple[Case, int]:
    """Read a case with its labels as the options say. -> (case, objects left out as too small). InputError if it is bad."""
    options = source.options
    eight_bits = (
        source.is_val and ending_of(source.path) == ".npz"
    )  # a challenge case for validation has no window to cut
    window = parse_window(options.window) if options.window and not eight_bits else None
    if source.labels:
        case = read_pair(source.path, source.labels, source.name, window)
    else:
        case = read_case(source.path, window=window).renamed(source.name)
    if case.labels is None:
        where = (
            "has no key 'gts'"
            if source.path.suffix == ".npz"
            else f"no labels such as {source.name}_mask lie beside it"
        )
        raise InputError(f"{source.path}: {where}; step 1 needs the masks, give training files")
    labels, small = case.labels, 0
    if options.dropped:
        labels = without_labels(labels, options.dropped)
    if options.instances:
        try:
            labels = instances_of(labels)
        except ValueError as error:
            raise InputError(f"{source.labels or source.path}: {error}; leave --instances away") from error
    if options.smallest:
        labels, small = without_small(labels, options.smallest)
    return replace(case, labels=labels), small


def write_validation_case(folder: Path, source: Source) -> int:
    """In a worker: one case as a challenge input, at original size. -> objects left out of it, no box can prompt them"""
    case, _ = read_source(source)
    truth, left_out = promptable_labels(case.labels)
    name = f"{'3DBox' if case.is_3d else '2DBox'}_{bare_name(case.name)}"
    try:
        stored = [load_npz(folder / kind / f"{name}.npz")[kind] for kind in ("imgs", "gts")]
        whole = np.array_equal(stored[0], case.image) and np.array_equal(stored[1], truth)
    except (InputError, KeyError):
        whole = False
    if truth.any() and not whole:
        write_case(folder, replace(case, labels=truth).renamed(name))
    return left_out


def shard_of(name: str, count: int) -> int:
    """The shard, 1 to `count`, that a case belongs to: by the SHA-256 of its person's key.

    A new file moves no other case, and one person's images are on one machine, which is best for volumes cut to slices.
    >>> [shard_of(name, 16) for name in ("US_0525", "CT_STS_STS-031-002", "PET_STS_STS-031-090")]
    [11, 8, 8]
    """
    key = hashlib.sha256(person_of(patient_of(name)).encode()).digest()
    return int.from_bytes(key[:8], "big") % count + 1


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). InputError if it is no such pair."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text}: give the number of this run and of all, such as 3/16 for the third of 16")
    return int(number), int(count)
