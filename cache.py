"""The cache that step 1 writes and step 2 reads: images as PNG, masks run-length coded, one index. [P 2.1]

    cache/imgs/NAME.png    (256, 256) or (256, 256, 3) uint8: the 256 grid, zero padded, before enhancement
    cache/masks/NAME.pkl   run-length code of the (256, 256) uint16 label map
    cache/index.csv        one row an image: a `CacheEntry`
    cache/version.json     format of all this; another one is refused
    cache/done.jsonl       journal of finished files, for resuming

A volume becomes one image for each slice that holds an object, NAME-zzz. Read top to bottom: groups and patients from file
names -> one case into the cache -> the index -> the journal of finished files -> the split. Masks: runlength.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np

from data import pad_to_square, resize_labels_to_grid, resize_to_grid
from enhance import is_gray
from model import GRID
from readers import Case, InputError, modality_of, read_image
from runlength import load_mask, save_mask
from writers import save_image, save_json, save_text

CACHE_VERSION = 1
SPLITS = ("train", "val")
JOURNAL = "done.jsonl"  # a line a file, written when its images are: what an interrupted run need not redo

# The groups of the released sampler: a file belongs to the first whose name starts its own.
SUBMODALITIES = (
    "teeth",
    *(f"CT_{name}" for name in (
        "AMOS", "AbdTumor", "AbdomenCT", "COVID-19-20-CT-SegChallenge", "CT-ORG", "LIDC-IDRI", "LungLesions",
        "LungMasks", "TCIA-LCTSC", "TotalSeg",
    )),
    *(f"MR_{name}" for name in (
        "AMOSMR", "BraTS", "Heart", "ISLES2022", "Prostate", "QIN-PROSTATE-Lesion", "QIN-PROSTATE-Prostate", "SpineMR",
        "WMH", "crossmoda",
    )),
    "Dermoscopy", "Endoscopy", "Fundus", "Mammo", "Microscopy", "OCT", "PET", "US", "XRay",
    "nuclei", "btcv", "hipxray", "microUS",
)  # fmt: skip


def bare_name(name: str) -> str:
    """A case's name without the challenge's "2D_", "3D_", "2DBox_" or "3DBox_"."""
    return re.sub(r"^[23]D(Box)?_", "", name)


def submodality_of(name: str) -> str:
    """The group of a case in the sampler: one of SUBMODALITIES, else modality and data set ("CT_STS").

    Spellings of one modality ("X-Ray", "XRay", "CXR"; "Microscope") go to one group.
    """
    bare, modality = bare_name(name), modality_of(name)
    group = next((group for group in SUBMODALITIES if bare.startswith(group)), None)
    if group:
        return group
    known = {"X-Ray": "XRay", "Mammography": "Mammo"}.get(modality, modality)
    if known in SUBMODALITIES:
        return known
    words = bare.split("_")
    return "_".join(words[:2]) if len(words) > 2 else words[0]


def patient_of(name: str) -> str:
    """Key of the patient that a case shows, as far as its name says: what the split must not cut apart.

    The name up to the first part of its last word, between hyphens, that has a digit: numbers of slices, sides and
    views follow after it. Cases of one key may still be two patients, which costs nothing; never a slice alone.
    >>> [patient_of(n) for n in ("2D_CT_CURVAS_10007-532", "3D_CT_STS_STS-031", "US_BUSBRA_benign-0847-s")]
    ['CT_CURVAS_10007', 'CT_STS_STS-031', 'US_BUSBRA_benign-0847']
    """
    words = bare_name(name).split("_")
    parts = words[-1].split("-")
    last = next((i for i, part in enumerate(parts) if re.search(r"\d", part)), len(parts) - 1)
    return "_".join([*words[:-1], "-".join(parts[: last + 1])])


@dataclass(frozen=True)
class CacheEntry:
    """One cached image: a row of index.csv."""

    name: str  # of its files, without ending
    modality: str
    submodality: str  # the sampler's group
    patient: str
    source: str  # file that it was made from
    height: int  # of the original image, pixels
    width: int
    split: str  # "train" or "val"
    objects: int  # on the grid


@dataclass(frozen=True)
class CachedCase:
    """What became of one case: a line of the journal."""

    name: str
    stamp: str  # path, size and time of its file: tells a changed one
    entries: list[CacheEntry]  # split still ""
    objects: int  # labels of the case
    empty: int  # slices without an object, left out
    lost: int  # objects of a slice that are too small for the grid


def image_path(folder: Path, name: str) -> Path:
    """Where an entry's image is."""
    return folder / "imgs" / f"{name}.png"


def mask_path(folder: Path, name: str) -> Path:
    """Where an entry's mask is."""
    return folder / "masks" / f"{name}.pkl"


def slice_names(case: Case) -> list[tuple[str, object]]:
    """[(name of the cached image, index of its plane)]: one for a picture, one a slice for a volume."""
    if not case.is_3d:
        return [(case.name, ...)]
    return [(f"{case.name}-{z:03d}", z) for z in range(len(case.image))]


def names_of_others(names: Iterable[str], known: dict[str, CachedCase]) -> dict[str, set[str]]:
    """{case: names in the cache that are not its to write}, as far as one of its own could equal them.

    names : cases of this run.   known : the journal; a name that it gives to a case stays that case's.
    A volume CT_a and a picture CT_a-003 collide: the volume's slice 3 is cached as CT_a-003 too.
    """
    owner = {entry.name: case for case, cached in known.items() for entry in cached.entries}
    names, taken = set(names), defaultdict(set)
    for name in {*names, *owner}:
        could_write = {name, re.sub(r"-\d{3,}$", "", name)}  # a picture of this name, or a volume's slice
        for case in (could_write & names) - {owner.get(name, name)}:
            taken[case].add(name)
    return taken


def cache_case(folder: Path, case: Case, source: str, stamp: str = "", keep_good: bool = False) -> CachedCase:
    """Write the images and masks of one case. keep_good: files of it that are there and whole stay as they are.

    source : name of its file, for the index.   stamp : what the journal tells it by.
    """
    if case.labels is None:
        raise InputError(f"{source}: has no key 'gts'; step 1 needs the masks, give training files")
    entries, empty, lost = [], 0, 0
    for name, z in slice_names(case):
        labels = case.labels[z]
        before = np.unique(labels[labels > 0]).size
        if before == 0:
            empty += 1
            continue
        small = resize_labels_to_grid(labels)
        after = np.unique(small[small > 0]).size
        lost += before - after
        if after == 0:
            continue
        height, width = labels.shape
        names = modality_of(case.name), submodality_of(case.name), patient_of(case.name)
        entry = CacheEntry(name, *names, source, height, width, "", after)
        if not (keep_good and is_readable(folder, entry)):
            image = case.image[z]
            image = image[..., 0] if image.ndim == 3 and is_gray(image) else image
            save_image(image_path(folder, name), pad_to_square(resize_to_grid(image), GRID))
            save_mask(mask_path(folder, name), pad_to_square(small, GRID))
        entries.append(entry)
    return CachedCase(case.name, stamp, entries, np.unique(case.labels[case.labels > 0]).size, empty, lost)


def load_entry(folder: Path, entry: CacheEntry) -> tuple[np.ndarray, np.ndarray]:
    """Image (256, 256) or (256, 256, 3) RGB uint8, and label map (256, 256) uint16, both on the padded grid."""
    path = image_path(folder, entry.name)
    image = read_image(path)
    if image.shape[:2] != (GRID, GRID):
        raise InputError(f"{path}: is {image.shape[:2]}, expected {GRID} x {GRID}; run 01_preprocess.py again")
    return image, load_mask(mask_path(folder, entry.name))


def is_readable(folder: Path, entry: CacheEntry) -> bool:
    """Whether both files of an entry are there and whole."""
    try:
        load_entry(folder, entry)
    except InputError:
        return False
    return True


def write_index(folder: Path, entries: list[CacheEntry]) -> None:
    """Write index.csv and version.json, rows sorted by name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(CacheEntry)])
    writer.writerows(astuple(entry) for entry in sorted(entries, key=lambda entry: entry.name))
    start_cache(folder)
    save_text(folder / "index.csv", text.getvalue())


def start_cache(folder: Path) -> None:
    """Mark a folder as a cache of this version. InputError if it holds one of another version."""
    if (folder / "version.json").exists() or (folder / "index.csv").exists():
        check_version(folder)
    save_json(folder / "version.json", {"cache": CACHE_VERSION})


def check_version(folder: Path) -> None:
    """InputError unless the folder is a cache of this version."""
    try:
        found = json.loads((folder / "version.json").read_text(encoding="utf-8"))["cache"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: no cache here (no good version.json); run first: python 01_preprocess.py -o {folder}"
        ) from error
    if found != CACHE_VERSION:
        raise InputError(
            f"{folder}: a cache of version {found}, but this code reads version {CACHE_VERSION}; "
            "delete it and run 01_preprocess.py again"
        )


def read_index(folder: Path) -> list[CacheEntry]:
    """The entries of a cache. InputError if there is none, or one of another version or with other columns."""
    check_version(folder)
    path, columns = folder / "index.csv", [field.name for field in fields(CacheEntry)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if header != columns:
            raise ValueError(f"its columns are {', '.join(header)}")
        entries = [CacheEntry(*row[:5], int(row[5]), int(row[6]), row[7], int(row[8])) for row in rows]
        for entry in entries:
            if entry.split not in SPLITS or Path(entry.name).name != entry.name:
                raise ValueError(f"a row has the name {entry.name!r} and the split {entry.split!r}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read; run first: python 01_preprocess.py -o {folder}") from error
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{path}: not an index of this cache ({error}); run 01_preprocess.py again") from error
    return entries


def read_journal(folder: Path) -> dict[str, CachedCase]:
    """What earlier runs finished, by name. A line cut short by an interruption counts as not done."""
    path, done = folder / JOURNAL, {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            record["entries"] = [CacheEntry(**entry) for entry in record["entries"]]
            done[record["name"]] = CachedCase(**record)
        except (ValueError, KeyError, TypeError):
            continue
    return done


def journal_line(cached: CachedCase) -> str:
    """A line of the journal. It begins with a line end, because the line before it may be cut short."""
    return f"\n{json.dumps(asdict(cached))}"


def fingerprint(folder: Path) -> str:
    """SHA-256 of the index: tells a resumed training that its data are the same."""
    return hashlib.sha256((folder / "index.csv").read_bytes()).hexdigest()


def split_entries(entries: list[CacheEntry], val_share: float = 0.01, seed: int = 0) -> list[CacheEntry]:
    """Fill in the split of the entries that have none: 1 % of each modality to validation, by patient. [P 3.2]

    A split that is there stays, and a new image follows its patient. Patients are drawn until the share is reached,
    at least one; one that holds more than half of its modality stays in training, and so does an only patient.
    Depends on the entries and the seed, not on their order.
    """
    groups: dict[str, dict[str, list[CacheEntry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        groups[entry.modality][entry.patient].append(entry)
    chosen = {}
    for modality, patients in groups.items():
        total = sum(map(len, patients.values()))
        splits = {key: next((e.split for e in group if e.split), "") for key, group in patients.items()}
        held = sum(len(patients[key]) for key, split in splits.items() if split == "val")
        free = sorted(key for key, split in splits.items() if not split and len(patients[key]) <= total / 2)
        rng = np.random.default_rng((seed, zlib.crc32(modality.encode())))
        for i in rng.permutation(len(free)):
            if held >= max(1, round(val_share * total)):
                break
            if held + len(patients[free[i]]) < total:
                splits[free[i]] = "val"
                held += len(patients[free[i]])
        chosen |= {(modality, key): split or "train" for key, split in splits.items()}
    return [entry if entry.split else replace(entry, split=chosen[entry.modality, entry.patient]) for entry in entries]


def update_index(
    folder: Path,
    finished: list[CachedCase],
    known: dict[str, CachedCase],
    splits: dict[str, str],
    excluded: set[str],
    val_share: float,
    seed: int,
) -> list[CacheEntry]:
    """Write the index: what was there, what a run of step 1 made of its files, and a split for what has none.

    known : the journal before the run.   splits : split given to each file's entries, "" to draw one.
    """
    before = read_index(folder) if (folder / "index.csv").exists() else []
    kept_splits = {entry.name: entry.split for entry in before}
    replaced = {entry.name for case in finished if case.name in known for entry in known[case.name].entries}
    entries = {entry.name: entry for entry in before if entry.name not in replaced}
    for case in finished:
        entries |= {e.name: replace(e, split=kept_splits.get(e.name, splits[case.name])) for e in case.entries}
    gone = excluded | {entry.name for name in excluded & set(known) for entry in known[name].entries}
    kept = [entry for name, entry in entries.items() if name not in gone]
    if not kept:
        raise InputError(f"{folder}: no file gave an image with an object, so there is nothing to train on")
    kept = split_entries(kept, val_share, seed)
    write_index(folder, kept)
    return sorted(kept, key=lambda entry: entry.name)


def split_warnings(entries: list[CacheEntry], limit: int = 5) -> list[str]:
    """A sentence for each patient who is in both training and validation; beyond `limit` patients, their number.

    No error: two patients of one key (see `patient_of`) look the same, and so does a split that was made so on purpose.
    """
    sides = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        sides[entry.patient][entry.split].append(entry.name)
    shared = [(patient, side["train"], side["val"]) for patient, side in sorted(sides.items()) if len(side) == 2]
    told = [
        f"patient {patient} is in training ({len(train)}, such as {train[0]}) and in validation ({len(val)}, such as "
        f"{val[0]}): scores will be too good, unless these are two patients; move the files, or --exclude some"
        for patient, train, val in shared[:limit]
    ]
    more = len(shared) - limit
    return told + [f"so {'is 1 patient' if more == 1 else f'are {more} patients'} more"] * (more > 0)


def summary(folder: Path, finished: list[CachedCase], entries: list[CacheEntry], thin: int, excluded: int) -> str:
    """One line: what a run of step 1 read, what the cache holds, what was left out and why."""
    count = Counter(entry.split for entry in entries)
    size = sum(path(folder, e.name).stat().st_size for e in entries for path in (image_path, mask_path))
    reasons = {
        "images or slices without an object": sum(case.empty for case in finished),
        "objects of a slice too small for the grid": sum(case.lost for case in finished),
        "objects too thin for a box in validation cases": thin,
        "files excluded": excluded,
    }
    left_out = ", ".join(f"{number:,} {what}" for what, number in reasons.items() if number) or "nothing"
    without = {entry.modality for entry in entries} - {entry.modality for entry in entries if entry.split == "val"}
    note = f"; no validation image of {', '.join(sorted(without))}, whose patients are too few" if without else ""
    return (
        f"{len(finished):,} files with {sum(case.objects for case in finished):,} objects; {folder} holds {len(entries):,} "
        f"images with {sum(e.objects for e in entries):,} objects, {count['train']:,} train and {count['val']:,} val, "
        f"{size / 1e6:.1f} MB; left out: {left_out}{note}"
    )
