"""What step 1 reads: which cases there are, and one case with its labels as --read wants them.

To add a public data set, add a row to DATA_SETS.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from formats import MAX_LABEL, InputError, bare_name, modality_of
from formats.cache import CachedCase, CacheEntry, in_parallel
from formats.case import Case
from formats.intensity import WINDOWS
from formats.npz import load_npz, write_case
from formats.partners import label_files, list_pairs
from formats.readers import Asked, ending_of, list_cases, name_of, read_case, read_options, read_pair
from formats.writing import progress, tell
from grid import promptable_labels


@dataclass(frozen=True, slots=True)
class Options:
    """What is done to a case before it is cached."""

    window: tuple[float, float] | None = None  # width and level; None for the file's own
    dropped: tuple[int, ...] = ()  # labels that become background
    instances: bool = False  # each connected part of a label becomes an object of its own
    smallest: int = 0  # objects of fewer pixels (2D) or voxels (3D), at the original size, become background


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read, or an image and its labels."""

    name: str  # of the case
    path: Path
    labels: Path | None
    split: str  # "train" or "val" where a validation folder was named, else "": it is drawn
    options: Options

    def stamp(self) -> str:
        """Sizes and times of the files, and the options: if one of them changes, the case is done again."""
        beside = [] if self.labels or ending_of(self.path) == ".npz" else label_files(self.path)
        found = [(path, path.stat()) for path in (self.path, self.labels, *beside) if path]
        # a folder's name alone: on a shared disk the folders above it may differ from machine to machine
        files = (f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found)
        return " ".join([*files, str(self.options)])

    def read(self) -> tuple[Case, int]:
        """The case with its labels as the options say, and how many objects were left out as too small.

        In this order, at the original size: dropped labels, connected parts, small objects.
        """
        options, is_npz, said = self.options, ending_of(self.path) == ".npz", modality_of(self.name)
        # a challenge case for validation has 8 bits: there is no window to cut
        window = None if is_npz and self.split == "val" else options.window
        # the case's name may begin with the modality that --read or the data set says
        asked = Asked(window, None if said == "Other" else said)
        if self.labels:
            case = read_pair(self.path, self.labels, self.name, asked)
        else:
            case = read_case(self.path, window=asked).renamed(self.name)
        if case.labels is None:
            lacks = "has no key 'gts'" if is_npz else f"no labels such as {self.name}_mask lie beside it"
            raise InputError(f"{self.path}: {lacks}; step 1 needs the masks, give training files")
        labels, small = case.labels, 0
        if options.dropped:
            labels = np.where(np.isin(labels, options.dropped), 0, labels)
        if options.instances:
            labels = instances_of(labels, self.labels or self.path)
        if options.smallest:
            labels, small = without_small(labels, options.smallest)
        return replace(case, labels=labels), small


def list_sources(
    folder: Path, masks: Path | None, val: Path | None, read: list[str], exclude: Path | None
) -> tuple[list[Source], set[str], int, int]:
    """-> the cases of step 1, sorted by name; the names to leave out, and how many cases have one; how many files are bad.

    masks : a folder of masks with the names of the images, or a COCO file.   val : a folder of challenge cases, which
    validate.   read : what --read says.   exclude : a text file of names. What is left out is told.
    """
    if exclude and not exclude.is_file():
        raise InputError(f"--exclude {exclude}: no such file; give a text file of names, one a line")
    # a name may not be UTF-8
    excluded = set(map(str.strip, exclude.read_text("utf-8", "surrogateescape").splitlines())) if exclude else set()
    read, problems = read_options(read), []
    dataset, prefix = read.pop("dataset", None), f"{read.pop('modality')}_" if "modality" in read else ""
    options = Options(**read)
    validation = [Source(name_of(path), path, None, "val", options) for path in (list_cases(val) if val else ())]
    if dataset:
        if masks or prefix:
            raise InputError(f"--read dataset={dataset}: knows masks and modality of its files; leave out yours")
        options, cases, problems = list_data_set(dataset, folder, options)
    elif masks:
        pairs, problems = list_pairs(folder, masks)
        cases = [(f"{prefix}{name_of(image)}", image, labels) for image, labels in pairs]
    else:
        cases = [(f"{prefix}{name_of(path)}", path, None) for path in list_cases(folder)]
    sources = {}
    for source in validation + [Source(*case, "train" if val else "", options) for case in cases]:
        first = sources.setdefault(source.name, source)
        if first is not source:
            where = first.path.parent
            problems.append(InputError(f"{source.path}: {where} holds a case of this name too, which is kept"))
    for problem in problems:
        tell(f"01_preprocess.py: left out: {problem}", error=True)
    chosen = [source for name, source in sorted(sources.items()) if name not in excluded]
    return chosen, excluded, len(sources) - len(chosen), len(problems)


@dataclass(frozen=True)
class DataSet:
    """How the files of a public data set lie as it was downloaded. Paths are relative to its folder, with "/"."""

    prefix: str  # modality, or modality and data set, that its cases' names begin with; "": the files' names say it
    images: str  # what an image's path matches to its end (regular expression); its group "case" names the case
    labels: tuple[str, ...]  # where its labels are: \1, \2, ... are groups of `images`; tried in turn; (): in the file
    looks_like: str  # the layout in words
    get: str  # where to download it
    window: tuple[float, float] | None = None  # width and level
    dropped: tuple[int, ...] = ()  # labels left out
    certain: bool = True  # whether public code that uses the files settles the layout


SOFT = WINDOWS["soft"]
PICTURE = r"(?:jpg|jpeg|png|bmp|tif|tiff)"
DATA_SETS = {
    "challenge": DataSet(
        "", r"(.*/)?(?P<case>[^/]+)\.npz", (), "MODALITY/DATASET/NAME.npz with imgs and gts, at any depth",
        "https://www.codabench.org/competitions/1847/",
    ),
    "nuclei": DataSet(
        "nuclei", rf"(.*/)?(?P<case>(stage_(1_train)|[^/]+)/[^/]+)\.{PICTURE}",
        (r"\1annotations/\3.json", r"\1annotations/stage\4.json"),  # there the folder is called stage_1_train
        "SUBSET/*.jpg with annotations/SUBSET.json (COCO)",
        "https://www.kaggle.com/gangadhar/nuclei-segmentation-in-microscope-cell-images",
    ),
    "btcv": DataSet(
        "btcv", r"((?:[^/]+/)*?)(?:(img|imagesTr)/)?img(?P<case>\d+)\.nii\.gz",
        (r"\1label/label\3.nii.gz", r"\1labelsTr/label\3.nii.gz", r"\1label\3.nii.gz"),
        "img/img0001.nii.gz with label/label0001.nii.gz, or both in one folder",
        "https://www.synapse.org/#!Synapse:syn3193805", SOFT,
    ),
    "microus": DataSet(
        "microUS", r"(.*/)?train/micro_ultrasound_scans/microUS_(?P<case>[^/]+)\.nii\.gz",
        (r"\1train/expert_annotations/expert_annotation_\2.nii.gz",),
        "train/micro_ultrasound_scans/microUS_train_01.nii.gz with train/expert_annotations/expert_annotation_train_01.nii.gz",
        "https://zenodo.org/records/10475293",
    ),
    "flare22": DataSet(
        "CT", r"(.*/)?images/(?P<case>[^/]+)_0000\.nii\.gz", (r"\1labels/\2.nii.gz",),
        "images/NAME_0000.nii.gz with labels/NAME.nii.gz", "https://zenodo.org/record/7860267", SOFT,
        (12,),  # duodenum, as the challenge did
    ),
    "hipxray": DataSet(
        "hipxray", rf"(.*/)?images/(?P<case>[^/]+)\.({PICTURE}|nii\.gz)",
        (r"\1labels/\2.\3", r"\1masks/\2.\3", r"\1labels/\2.png", r"\1masks/\2.png"),
        "images/NAME.png (or .jpg, .nii.gz) with labels/ or masks/ of the same name",
        "https://data.mendeley.com/datasets/zm6bxzhmfz", certain=False,
    ),
    "toothseg": DataSet(
        "teeth", rf"(.*/)?img/(?P<case>[^/]+)\.({PICTURE})", (r"\1ann/\2.\3.json", r"\1ann/\2.json"),
        "img/1.jpg with ann/1.jpg.json (Supervisely)",
        "https://www.kaggle.com/datasets/humansintheloop/teeth-segmentation-on-dental-x-ray-images", certain=False,
    ),
}  # fmt: skip


def list_data_set(name: str, folder: Path, options: Options) -> tuple[Options, list[tuple], list[InputError]]:
    """The cases of a data set, at any depth below the folder, or one sentence if the folder does not look like it.

    -> (its options, (name, image, labels) each, one InputError for each image without labels). A
    window in `options` takes the place of the data set's own.
    """
    if name not in DATA_SETS:
        raise InputError(f"--read dataset={name}: no such data set; there are {', '.join(DATA_SETS)}")
    data_set, cases, problems = DATA_SETS[name], [], []
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download {name} from {data_set.get} and name its folder")
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")  # a Mac's notes have a dot
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    there = set(files)
    for file in files:
        if not (found := re.fullmatch(data_set.images, file, re.IGNORECASE)):
            continue
        expected = [found.expand(place) for place in data_set.labels]
        labels = next((folder / place for place in expected if place in there), None)
        if expected and not labels:
            where = folder / expected[0]
            problems.append(InputError(f"{folder / file}: has no labels at {where}; add them, or remove this image"))
            continue
        case = "_".join(filter(None, (data_set.prefix, found["case"].replace("/", "_"))))
        if modality_of(case) == "Other":  # a challenge file whose folders say what it shows
            case = name_of(Path(file.replace("/", "_")))
        cases.append((case, folder / file, labels))
    if not cases:
        here = f"{len(files)} files here" + (f", such as {', '.join(files[:2])}" if files else "")
        found = f"of {here}, {len(problems)} are its images and none has labels"
        advice = "name the unpacked folder"
        raise InputError(f"{folder}: data set {name} looks like {data_set.looks_like}, but {found}; {advice}")
    if not data_set.certain:
        tell(f"01_preprocess.py: data set {name}: its layout is not certain, look at some cached masks", error=True)
    return replace(options, window=options.window or data_set.window, dropped=data_set.dropped), cases, problems


def instances_of(labels: np.ndarray, path: Path | str = "labels") -> np.ndarray:
    """Each connected part of each label as an object of its own, numbered 1, 2, ... in the order of its first pixel.

    labels : (H, W) or (D, H, W) uint16. Pixels that share a corner are connected: 8 neighbours in 2D, 26 in 3D.
    Returns uint16 of this shape. InputError if there are more than 65,535 parts.
    >>> instances_of(np.array([[3, 0, 3], [0, 3, 0], [0, 0, 0], [3, 0, 5]], np.uint16)).tolist()
    [[1, 0, 1], [0, 1, 0], [0, 0, 0], [2, 0, 3]]
    """
    from skimage.measure import label  # only here: slow to import

    parts, count = label(labels, connectivity=labels.ndim, return_num=True, background=0)
    if count > MAX_LABEL:
        most = f"more than the {MAX_LABEL} labels that a mask can hold"
        raise InputError(f"{path}: has {count} connected parts, {most}; leave out --read instances")
    return parts.astype(np.uint16)


def without_small(labels: np.ndarray, smallest: int) -> tuple[np.ndarray, int]:
    """Objects of fewer than `smallest` pixels (2D) or voxels (3D) become background. -> (labels, objects dropped)

    >>> kept, dropped = without_small(np.array([[1, 1, 2]], np.uint16), 2)
    >>> kept.tolist(), dropped
    ([[1, 1, 0]], 1)
    """
    found, pixels = np.unique(labels, return_counts=True)
    dropped = found[(pixels < smallest) & (found > 0)]
    return np.where(np.isin(labels, dropped), 0, labels), len(dropped)


def write_validation_cases(
    folder: Path, cases: list[tuple[Source, CachedCase]], entries: list[CacheEntry], workers: int | str
) -> int:
    """Write the cases of which an image is for validation as challenge inputs. -> objects left out: no box can prompt them"""
    held_out = {entry.name for entry in entries if entry.split == "val"}
    chosen = [(folder, source) for source, cached in cases if held_out & {entry.name for entry in cached.entries}]
    return sum(progress(in_parallel(write_validation_case, chosen, workers), "validation cases", len(chosen)))


def write_validation_case(job: tuple[Path, Source]) -> int:
    """In a worker: one case at its original size, unless it is there. -> objects left out"""
    folder, source = job
    case, _ = source.read()
    truth, left_out = promptable_labels(case.labels)
    case = replace(case, labels=truth).renamed(f"{'3DBox' if case.is_3d else '2DBox'}_{bare_name(case.name)}")
    try:
        stored = [load_npz(folder / kind / f"{case.name}.npz")[kind] for kind in ("imgs", "gts")]
        whole = np.array_equal(stored[0], case.image) and np.array_equal(stored[1], truth)
    except (InputError, KeyError):
        whole = False
    if truth.any() and not whole:
        write_case(folder, case)
    return left_out
