"""Public data sets by name: where their images and labels lie, and how step 1 is to read them.

    python 01_preprocess.py --recipe btcv -i DOWNLOADED_FOLDER

A row of RECIPES is a data set. Its images are found at any depth below the folder, and the labels from the image's place.
The layouts were read in public code that uses the data; `verified` is False where it was not found for certain. A run tells that.
Another data set is another row.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from files import InputError, modality_of
from files.formats import name_of
from files.sources import Options, Source


@dataclass(frozen=True)
class Recipe:
    """How a data set's files lie. Paths are relative to the folder that is given, with "/"."""

    prefix: str  # modality, or modality and data set, that its cases' names begin with; "": the files' names say it
    images: str  # what an image's path matches to its end (regular expression); its group "case" names the case
    labels: tuple[str, ...]  # where its labels are: \1, \2, ... are groups of `images`; tried in turn; (): in the file
    looks_like: str  # the layout in words
    get: str  # where to download it
    options: Options = Options()
    verified: bool = True


PICTURE = r"(?:jpg|jpeg|png|bmp|tif|tiff)"
RECIPES = {
    "challenge": Recipe(
        "", r"(.*/)?(?P<case>[^/]+)\.npz", (),
        "MODALITY/DATASET/NAME.npz with imgs and gts, at any depth",
        "https://www.codabench.org/competitions/1847/",
    ),
    "nuclei": Recipe(
        "nuclei", rf"(.*/)?(?P<case>(stage_(1_train)|[^/]+)/[^/]+)\.{PICTURE}",
        (r"\1annotations/\3.json", r"\1annotations/stage\4.json"),  # there the folder is called stage_1_train
        "SUBSET/*.jpg with annotations/SUBSET.json (COCO)",
        "https://www.kaggle.com/gangadhar/nuclei-segmentation-in-microscope-cell-images",
    ),
    "btcv": Recipe(
        "btcv", r"((?:[^/]+/)*?)(?:(img|imagesTr)/)?img(?P<case>\d+)\.nii\.gz",
        (r"\1label/label\3.nii.gz", r"\1labelsTr/label\3.nii.gz", r"\1label\3.nii.gz"),
        "img/img0001.nii.gz with label/label0001.nii.gz, or both in one folder",
        "https://www.synapse.org/#!Synapse:syn3193805", Options(window="400/40"),
    ),
    "microus": Recipe(
        "microUS", r"(.*/)?train/micro_ultrasound_scans/microUS_(?P<case>[^/]+)\.nii\.gz",
        (r"\1train/expert_annotations/expert_annotation_\2.nii.gz",),
        "train/micro_ultrasound_scans/microUS_train_01.nii.gz with train/expert_annotations/expert_annotation_train_01.nii.gz",
        "https://zenodo.org/records/10475293",
    ),
    "flare22": Recipe(
        "CT", r"(.*/)?images/(?P<case>[^/]+)_0000\.nii\.gz", (r"\1labels/\2.nii.gz",),
        "images/NAME_0000.nii.gz with labels/NAME.nii.gz",
        "https://zenodo.org/record/7860267", Options(window="400/40", dropped=(12,)),  # duodenum, as the challenge did
    ),
    "hipxray": Recipe(
        "hipxray", rf"(.*/)?images/(?P<case>[^/]+)\.({PICTURE}|nii\.gz)",
        (r"\1labels/\2.\3", r"\1masks/\2.\3", r"\1labels/\2.png", r"\1masks/\2.png"),
        "images/NAME.png (or .jpg, .nii.gz) with labels/ or masks/ of the same name",
        "https://data.mendeley.com/datasets/zm6bxzhmfz", verified=False,
    ),
    "toothseg": Recipe(
        "teeth", rf"(.*/)?img/(?P<case>[^/]+)\.({PICTURE})", (r"\1ann/\2.\3.json", r"\1ann/\2.json"),
        "img/1.jpg with ann/1.jpg.json (Supervisely)",
        "https://www.kaggle.com/datasets/humansintheloop/teeth-segmentation-on-dental-x-ray-images", verified=False,
    ),
}  # fmt: skip


def list_recipe(name: str, folder: Path, options: Options | None = None) -> tuple[list[Source], list[InputError]]:
    """The cases of a data set -> (sources sorted by name, one InputError for each image without labels).

    options : a window that is given there replaces the recipe's; instances and smallest come beside what the recipe does.
    InputError, one sentence, if the folder does not look like the data set.
    """
    recipe, options = RECIPES[name], options or Options()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download {name} from {recipe.get} and name its folder")
    options = Options(
        options.window or recipe.options.window,
        recipe.options.dropped,
        options.instances or recipe.options.instances,
        options.smallest,
    )
    files, sources, problems = files_below(folder), [], []
    there, wanted = set(files), re.compile(recipe.images, re.IGNORECASE)
    for file in files:
        if not (found := wanted.fullmatch(file)):
            continue
        places = [found.expand(place) for place in recipe.labels]
        labels = next((folder / place for place in places if place in there), None)
        if places and not labels:
            where = folder / places[0]
            problems.append(InputError(f"{folder / file}: has no labels at {where}; add them, or remove this image"))
        else:
            sources.append(Source(case_name(recipe, found["case"], file), folder / file, labels, options=options))
    if not sources:
        raise InputError(
            f"{folder}: recipe {name} looks for {recipe.looks_like}, but {what_lies_in(folder, len(problems))}"
        )
    return sorted(sources, key=lambda source: source.name), problems


def files_below(folder: Path) -> list[str]:
    """Paths of all files at any depth, relative, with "/", sorted."""
    found = []
    for place, _, names in os.walk(folder):
        below = Path(place).relative_to(folder)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]  # ._NAME: a Mac's notes
    return sorted(found)


def case_name(recipe: Recipe, found: str, relative: str) -> str:
    """The name of a case: modality and data set first, as the challenge's names have them, then what tells it apart.

    A challenge file whose name begins with no modality gets its folders' names before its own.
    """
    name = found.replace("/", "_")
    if recipe.prefix:
        return f"{recipe.prefix}_{name}"
    return name if modality_of(name) != "Other" else name_of(Path(relative.replace("/", "_")))


def what_lies_in(folder: Path, images: int) -> str:
    """What a folder holds in place of a data set: the end of a sentence."""
    if images:
        return f"found {images} images and labels of none; check that the labels were unpacked too"
    files = files_below(folder)
    if not files:
        return "the folder is empty; unpack the download there"
    return f"found {len(files)} files such as {', '.join(files[:2])}; name the folder that the download unpacks to"
