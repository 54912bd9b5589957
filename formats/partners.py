"""Which files of a folder belong together: an image and its labels, the slices of a DICOM series.

Labels have the image's name with a word such as mask, label, seg or gt: a.png and a_mask.png,
img0001.nii.gz and label0001.nii.gz, a.png and a_mask_1.png, a_mask_2.png (an object each). Or they
have the image's name, in a folder masks or labels beside a folder images; nnU-Net's images have the
number of their channel as well: imagesTr/a_0000.nii.gz and labelsTr/a.nii.gz. Or a COCO file lists the image.
"""

import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from formats import InputError, entries_of
from formats.annotations import coco_files, is_coco, layout_of
from formats.pictures import PICTURE_ENDINGS

LABEL_WORDS = set("masks labels segs segmentations gt gts groundtruth annotation annotations".split())
LABEL_ENDS = ("mask", "label", "seg", "segmentation")  # alone, or at a word's end: odseg
IMAGE_WORDS = {"image", "images", "img", "imgs"}
VOLUME_ENDINGS = (".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
ENDING = re.compile(r"(\.nii)?\.[^.]+$")
CHANNEL = re.compile(r"_\d{4}$")  # of nnU-Net: several files of one case, which share one file of labels


def label_files(path: Path) -> list[Path]:
    """The files that hold an image's labels, sorted by name; none if there are none."""
    return _partners(path.parent, _state(path.parent)).get(path, [])


def label_files_in(folder: Path) -> set[Path]:
    """All files of a folder that hold the labels of another one."""
    return {file for files in _partners(folder, _state(folder)).values() for file in files}


def list_pairs(images: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[InputError]]:
    """Images of one folder and their labels: files of another folder with the same names, or a COCO file.

    Endings may differ: a.jpg and a.png. -> (pairs sorted by name, one InputError for each file that has no partner)
    """
    if masks.suffix == ".json":
        listed = coco_files(masks)
        found = sorted(path for group in _files_by_stem(images).values() for path in group)
        lone = [path for path in found if path.name not in listed]
        problems = [InputError(f"{path}: is not listed in {masks}; add it, or remove this file") for path in lone]
        return [(path, masks) for path in found if path.name in listed], problems
    pairs, problems, mine, partners = [], [], _files_by_stem(images), _files_by_stem(masks)
    shared = {stem: label for stem in mine.keys() - partners.keys() if (label := CHANNEL.sub("", stem)) in partners}
    partners |= {stem: partners[label] for stem, label in shared.items()}
    for label in set(shared.values()) - mine.keys():
        del partners[label]
    for stem in sorted(mine.keys() | partners.keys()):
        here, there = mine[stem], partners[stem]
        if len(here) == 1 and len(there) == 1:
            pairs.append((here[0], there[0]))
        elif here and there:
            names = ", ".join(path.name for path in (*here, *there))
            problems.append(InputError(f"{images}: {names} share one name; keep one image and one mask of each name"))
        else:
            lone, other = (here[0], masks) if here else (there[0], images)
            problems.append(InputError(f"{lone}: has no partner named {stem} in {other}; add it, or remove this file"))
    return pairs, problems


def _files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """{name without ending: files} of the images or masks in a folder. InputError if it holds none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of PNG, JPG, TIFF, BMP, NIfTI, NRRD or MHA files")
    by_stem = defaultdict(list)
    for path in entries_of(folder):
        if _family(path) in ("picture", *VOLUME_ENDINGS):
            by_stem[_stem(path)].append(path)
    if not by_stem:
        raise InputError(f"{folder}: holds no PNG, JPG, TIFF, BMP, NIfTI, NRRD or MHA file; name another folder")
    return by_stem


def dicom_cases(folder: Path, files: list[Path]) -> list[Path]:
    """The cases among files and folders: folders of DICOM files at any depth, and all files; `folder` if all are DICOM."""
    from formats.dicom import dicom_files, is_dicom  # only here: pydicom takes a third of a second to load

    below = [one for path in files if path.is_dir() for one in (path, *path.rglob("*")) if one.is_dir()]
    found = [case for one in below for case in _cases_of(one, dicom_files(one))]
    files = [path for path in files if not path.is_dir()]
    if not found and all(map(is_dicom, files)):
        return _cases_of(folder, dicom_files(folder))
    return sorted(files + found)


def _cases_of(folder: Path, files: list[Path]) -> list[Path]:
    """The cases of a folder's DICOM files: the folder, if they are slices or have labels; else each picture by itself."""
    from formats.dicom import LABEL_KINDS, is_scan, read_header

    pictures = []
    for path in files:
        try:
            header = read_header(path)
        except InputError:  # told when it is read
            pictures.append(path)
            continue
        if is_scan(header) or header.get("Modality") in LABEL_KINDS or "ImagePositionPatient" in header:
            return [folder]
        pictures += [path] if "Rows" in header else []
    return pictures if len(pictures) > 1 else [folder] * bool(files)


def _state(folder: Path) -> tuple:
    """Changes when a file of the folder, or of a folder of labels beside it, comes or goes."""
    return tuple(one.stat().st_mtime_ns for one in (folder, *_label_folders(folder)))


def _label_folders(folder: Path) -> list[Path]:
    """Folders of labels beside a folder of images: masks beside images, labelsTr beside imagesTr."""
    if not IMAGE_WORDS & set(_words(folder.name)):
        return []
    siblings = (one for one in entries_of(folder.parent) if one.is_dir() and one != folder)
    return [one for one in siblings if _label_words(one.name) and _key(one.name) == _key(folder.name)]


@lru_cache(maxsize=8)  # one look at a folder for all its files
def _partners(folder: Path, _changed: tuple) -> dict[Path, list[Path]]:
    """{image: the files of its labels}"""
    files = [path for path in entries_of(folder) if path.is_file()]
    pictures = [path for path in files if path.suffix != ".json"]
    labels = [path for path in pictures if _label_words(_stem(path))]
    labels += [path for one in _label_folders(folder) for path in entries_of(one) if path.is_file()]
    images = {path.name: path for path in pictures if not _label_words(_stem(path))}
    by_key, by_case, found = defaultdict(list), defaultdict(list), defaultdict(list)
    for path in images.values():
        by_key[_family(path), _key(_stem(path))].append(path)
        by_case[_family(path), _key(CHANNEL.sub("", _stem(path)))].append(path)
    for path in labels:
        key = _key(_stem(path))
        # the longest name that fits: a_1_mask is of a_1, not of a
        prefixes = ((_family(path), key[:end]) for end in range(len(key), 0, -1))
        channels = by_case[_family(path), key] if path.parent != folder else []
        for owner in next((by_key[prefix] for prefix in prefixes if prefix in by_key), channels):
            found[owner].append(path)
    bare = {_stem(path): path for path in images.values()}
    for path in files:
        if path.suffix == ".json" and path.stem in images:  # Supervisely: a.jpg.json of a.jpg
            found[images[path.stem]].insert(0, path)
        elif path.suffix == ".json" and is_coco(path):
            for image in (images[name] for name in coco_files(path) & images.keys()):
                found[image].insert(0, path)  # two files: whoever reads this image is told, and the others are read
        elif path.suffix == ".json" and path.stem in bare and layout_of(path):  # a.json of a.png
            found[bare[path.stem]].insert(0, path)
    return dict(found)


def _family(path: Path) -> str:
    """Labels are of the image's kind: pictures with pictures, else the same ending."""
    ending = ENDING.search(path.name.lower())
    ending = ending.group() if ending else ""
    return "picture" if ending in PICTURE_ENDINGS else ending.replace(".nii.gz", ".nii")


def _stem(path: Path) -> str:
    return ENDING.sub("", path.name)


def _words(name: str) -> list[str]:
    """A name's words in lower case: "drishtiGS_011_ODsegSoftmap" -> drishti gs 011 od seg softmap."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-zà-ÿ]+|\d+|[^\W\d_A-Za-z]+", name)]


def _label_words(name: str) -> set[str]:
    """The words of a name that say that a file holds labels."""
    return {word for word in _words(name) if word in LABEL_WORDS or word.endswith(LABEL_ENDS)}


def _key(name: str) -> tuple[str, ...]:
    """The words of a name that do not say whether it is an image or its labels."""
    others = IMAGE_WORDS | _label_words(name)
    return tuple(word for word in _words(name) if word not in others)
