"""All reading and writing of files, and what all modules share: `InputError`, and the facts about modalities.

    readers.py      which function reads what; a case's labels and boxes, boxes.csv
    case.py         one image with its boxes and labels; the checks that every input passes
    npz, pictures, scans, dicom, dicom_out, annotations     one kind of file each
    partners.py     which files of a folder belong together
    intensity.py    more than 8 bits to grey levels: windows and percentiles
    results.py      what step 4 is asked for and writes
    truth.py        what step 5 reads
    sources.py      what step 1 reads; public data sets by name
    cache.py        what step 1 writes: index and journal; many cores and machines
    checkpoints.py  weights
    writing.py      files out, each whole or not at all; the progress bar

A fork for other data adds its modalities here, its data sets in sources.py, its format in readers.py.
"""

import os
import re
from pathlib import Path

# Bytes that one file may unpack to: a damaged header, or one made to fill the memory, may claim any number
MOST_BYTES = int(float(os.environ.get("GRAYS_LIMIT_GB") or 1) * 2**30)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")  # a DICOM file may have none as well
MAX_LABEL = 65_535  # labels are uint16 everywhere (D9): the challenge has images with more than 255 objects


class InputError(ValueError):
    """Bad input, told in one sentence: which file, what was found, what to do. At most 300 characters, all printable."""

    def __init__(self, text: str) -> None:
        text = printable(text)
        super().__init__(text if len(text) <= 300 else f"{text[:170]} ... {text[-125:]}")


def printable(text: str) -> str:
    """One line that a terminal shows as it is. A name may hold anything but / and \\0: line ends, what moves the cursor
    or turns the text round, bytes that are not UTF-8. Those are written as Python writes them.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    return (
        text if text.isprintable() else "".join(c if c.isprintable() or c == "\u00a0" else ascii(c)[1:-1] for c in text)
    )


def usable_cores() -> int:
    """Processor cores that this process may use; a container or a cluster may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def entries_of(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without the ._NAME files that a Mac leaves beside each file."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("._"))


# ---------------------------------------------------------------- modalities and data sets, by the names of files

PAPER_MODALITIES = "CT MR PET US X-Ray Dermoscopy Endoscopy Fundus Microscopy".split()  # rows of [P Table 4]
MODALITIES = [*PAPER_MODALITIES, "OCT", "Mammography", "Other"]
VOLUME_MODALITIES = ("CT", "MR", "PET")  # sampled by sub-modality, the others by modality [P 3.2]

# What the first word of a file's name begins with, lower case, hyphens removed -> modality. The first match
# counts: micro-ultrasound is ultrasound, not microscopy.
MODALITY_PREFIXES = (
    ("microus", "US"), ("mamm", "Mammography"), ("micro", "Microscopy"), ("nuclei", "Microscopy"), ("oct", "OCT"),
    ("ct", "CT"), ("btcv", "CT"), ("mr", "MR"), ("pet", "PET"), ("us", "US"), ("ultra", "US"), ("xr", "X-Ray"),
    ("cxr", "X-Ray"), ("hipxray", "X-Ray"), ("teeth", "X-Ray"), ("derm", "Dermoscopy"), ("endo", "Endoscopy"),
    ("fundus", "Fundus"),
)  # fmt: skip

# The groups of the released sampler: a file belongs to the first whose name its own name begins with.
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


def modality_of(name: str) -> str:
    """Modality that a challenge-style file name starts with ("2DBox_X-Ray_0053" -> "X-Ray"); "Other" if none."""
    words = name.split("_")
    if words[0].lower() in ("2dbox", "3dbox", "2d", "3d"):
        words = words[1:]
    first = words[0].lower().replace("-", "") if words else ""
    return next((modality for prefix, modality in MODALITY_PREFIXES if first.startswith(prefix)), "Other")


def is_drawn(name: str) -> bool:
    """True for an image that demo_data drew, which its name says at the end. A score on it says nothing of patients.

    >>> [is_drawn(name) for name in ("3DBox_CT_synthetic0", "2DBox_US_tiny0", "2DBox_Fundus_retina")]
    [True, True, False]
    """
    return re.search(r"_(synthetic|tiny)\d+$", name) is not None


def submodality_of(name: str) -> str:
    """The group of a case in the sampler: one of SUBMODALITIES, else modality and data set ("CT_STS")."""
    bare, modality = bare_name(name), modality_of(name)
    known = {"X-Ray": "XRay", "Mammography": "Mammo"}.get(modality, modality)
    for group in SUBMODALITIES:
        if bare.startswith(group):
            return group
    if known in SUBMODALITIES:
        return known
    words = bare.split("_")
    return "_".join(words[:2]) if len(words) > 2 else words[0]


def patient_of(name: str) -> str:
    """Key of the patient that a case shows, as far as its name says: what the split must not cut apart.

    Words lie between "_". The key has all words but the last, and the last one's parts between "-" up
    to the first with a digit: numbers of slices, sides and views follow it. Two patients may share a key.
    >>> [patient_of(n) for n in ("2D_CT_CURVAS_10007-532", "3D_CT_STS_STS-031", "US_BUSBRA_benign-0847-s")]
    ['CT_CURVAS_10007', 'CT_STS_STS-031', 'US_BUSBRA_benign-0847']
    """
    words = bare_name(name).split("_")
    parts = words[-1].split("-")
    last = next((i for i, part in enumerate(parts) if re.search(r"\d", part)), len(parts) - 1)
    return "_".join([*words[:-1], "-".join(parts[: last + 1])])


def person_of(patient: str) -> str:
    """A patient's key without the modality, where it names a data set too: one person may be scanned in two ways.

    >>> [person_of(key) for key in ("CT_STS_STS-031", "PET_STS_STS-031", "US_0525")]
    ['STS_STS-031', 'STS_STS-031', 'US_0525']
    """
    return patient.split("_", 1)[1] if patient.count("_") > 1 else patient
