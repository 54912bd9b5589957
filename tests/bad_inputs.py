"""The catalogue: bad inputs, each as a command of one of the five scripts, and what a good answer to it is.

A good answer: no traceback, no death by signal, an end; exit code not 0 where the input is bad; one sentence about it, of
at most 300 characters, on stderr; at most 2 s and 1.5 GB more than the same command with good input; the good case beside
the bad one done; the inputs as they were; nothing half-written; no code run that a file brings.
"""

import os
import pickle
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from warnings import catch_warnings

import numpy as np
import torch
from commands import Done, command, proper_command, small_checkpoint
from test_robust import (
    BAD,
    GOOD,
    MOST_LETTERS,
    PICTURE,
    device,
    fifo,
    itk,
    nifti,
    npz_bomb,
    pickled,
    picture,
    png_header,
    tiff,
    written,
)

from demo_data import tiny_cache, tiny_case
from formats.checkpoints import read_checkpoint, save_checkpoint
from formats.npz import write_case, write_training_case
from formats.writing import save_image, save_npz

MORE_SECONDS, MORE_MIB = 2, 1536
PREFIX = 40  # letters before the sentence: 05_evaluate.py: left out:
GOOD_CASE = "2DBox_US_good"
LONG = "a" * 251


class Payload:
    """What a pickle must not do: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Attack(NamedTuple):
    """A bad input as a command.   make(folder): writes it, -> (script, arguments)."""

    name: str
    make: Callable[[Path], tuple]
    bad: str = ""  # part of the name of the bad file, which one sentence must hold
    kept: tuple[str, ...] = ()  # what must be there afterwards: patterns
    fails: bool | None = True  # whether it must be refused; None: it may, or be done


# ---------------------------------------------------------------- files of cases, for steps 1, 3, 4 and 5


def case_arrays(**changed) -> dict:
    case = tiny_case()
    arrays = {"imgs": case.image, "gts": case.labels, "boxes": np.array([[10, 8, 45, 40]])} | changed
    return {key: value for key, value in arrays.items() if value is not None}


def npz_of(name: str = "2DBox_US_bad.npz", **changed) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / name, **case_arrays(**changed))
        return folder / name

    return make


def volume_of(**changed) -> Callable[[Path], Path]:
    case = tiny_case(dims=3)
    arrays = {"imgs": case.image, "gts": case.labels, "spacing": np.ones(3), "segs": case.labels}
    return npz_of("3DBox_CT_bad.npz", **arrays | {"boxes": None} | changed)


def cut(make: Callable, share: float) -> Callable[[Path], Path]:
    def cut_short(folder: Path) -> Path:
        path = make(folder)
        return written(path, path.read_bytes()[: int(share * path.stat().st_size)])

    return cut_short


def other_content(make: Callable, content: bytes) -> Callable[[Path], Path]:
    return lambda folder: written(make(folder), content)


def zipped(**members: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "2DBox_US_bad.npz", "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        return folder / "2DBox_US_bad.npz"

    return make


def renamed(make: Callable) -> Callable[[Path], Path]:
    return lambda folder: make(folder).rename(folder / "2DBox_US_bad.npz")


def under(name: str, kind: str) -> Callable[[Path], Path]:
    """Something of this name that is no plain file."""

    def make(folder: Path) -> Path:
        path = folder / name
        if kind == "folder":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as one:
                here = os.getcwd()
                os.chdir(folder)
                one.bind(name)
                os.chdir(here)
        else:
            path.symlink_to({"dead link": "nowhere", "circle": name, "link out": "/etc/passwd"}[kind])
        return path

    return make


HEAD = {
    "type": "GIF89a",
    "text": b"once upon a time\n",
    "page": b"<html><script>alert(1)</script>",
    "zeros": bytes(5000),
}
ARRAY = np.array
BAD_NPZ = {
    "no key": npz_of(imgs=None), "neither boxes nor gts": npz_of(boxes=None, gts=None), "4D image": npz_of(imgs=np.zeros((2, 2, 2, 2))),
    "image of letters": npz_of(imgs=ARRAY(["a"])), "complex image": npz_of(imgs=np.ones((64, 64), complex)),
    "image of NaN": npz_of(imgs=np.full((64, 64), np.nan)), "image of infinity": npz_of(imgs=np.full((64, 64), np.inf)),
    "image of 300": npz_of(imgs=np.full((64, 64), 300)), "image of -1": npz_of(imgs=np.full((64, 64), -1)),
    "image of 0 to 1": npz_of(imgs=np.eye(64) * 0.5), "empty image": npz_of(imgs=np.zeros((0, 0), np.uint8)),
    "image without height": npz_of(imgs=np.zeros((0, 64), np.uint8)), "image is a number": npz_of(imgs=5),
    "image of 4 channels": npz_of(imgs=np.zeros((64, 64, 4), np.uint8)), "image of dates": npz_of(imgs=ARRAY(["2020-01-01"], "M8[D]")),
    "records": npz_of(imgs=np.zeros(4, [("a", int)])), "labels of letters": npz_of(gts=ARRAY(["a"])),
    "labels of floats": npz_of(gts=np.ones((64, 64))), "labels of NaN": npz_of(gts=np.full((64, 64), np.nan)),
    "labels below 0": npz_of(gts=np.full((64, 64), -1)), "labels above 65535": npz_of(gts=np.full((64, 64), 70000)),
    "labels of another shape": npz_of(gts=np.ones((9, 9), int)), "no labels but 0": npz_of(gts=np.zeros((64, 64), int)),
    "labels of 3 axes": npz_of(gts=np.ones((64, 64, 3), int)), "labels of 64 bits": npz_of(gts=np.full((64, 64), 2**63, np.uint64)),
    "an object array": npz_of(imgs=ARRAY([{}], object)), "labels are objects": npz_of(gts=ARRAY([{}], object)),
    "spacing of 0": volume_of(spacing=ARRAY([1, 0, 1])), "spacing of NaN": volume_of(spacing=ARRAY([1, np.nan, 1])),
    "spacing below 0": volume_of(spacing=ARRAY([-1, 1, 1])), "spacing of 2": volume_of(spacing=ARRAY([1, 1])),
    "spacing of infinity": volume_of(spacing=ARRAY([1, np.inf, 1])), "spacing of letters": volume_of(spacing=ARRAY(["a", "b", "c"])),
    "spacing is an object": volume_of(spacing=ARRAY([None] * 3)), "volume of 2 axes": volume_of(imgs=np.zeros((9, 9), np.uint8), gts=np.zeros((9, 9), int)),
    "empty volume": volume_of(imgs=np.zeros((0, 9, 9), np.uint8), gts=np.zeros((0, 9, 9), int)),
    "zip of text": zipped(**{"imgs.npy": b"hello", "gts.npy": b"hello"}), "zip without arrays": zipped(**{"a.txt": b"hello"}),
    "zip that is empty": zipped(), "zip of a name with ..": zipped(**{"../../imgs.npy": b"hello"}),
    "a header of a million letters": zipped(**{"imgs.npy": b"\x93NUMPY\x02\0" + struct.pack("<I", 10**6) + b"(" * 10**6, "gts.npy": b""}),
    "a header that is code": zipped(**{"imgs.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", 30) + b"__import__('os').mkdir('CODE')", "gts.npy": b""}),
    "a shape that is no number": zipped(**{"imgs.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", 58) + b"{'descr':'|u1','fortran_order':False,'shape':('a','b'),}   \n"}),
    "claims 2^62": renamed(npz_bomb((1, 100), (2**62,))), "claims 4 GB": renamed(npz_bomb((1, 100), (2**32,))), "claims -1": renamed(npz_bomb((1, 100), (-1, 5))),
    "claims wide letters": renamed(npz_bomb((1, 100), (2,), "<U500000000")), "of 1,000 members": renamed(BAD["npz of 1,000 members"]),
    **{f"of {name}": other_content(npz_of(), content) for name, content in HEAD.items() if isinstance(content, bytes)},
    **{f"cut at {share}": cut(npz_of(), share) for share in (0, 0.001, 0.1, 0.5, 0.9, 0.99)},
    **{kind: under("2DBox_US_bad.npz", kind) for kind in ("folder", "socket", "dead link", "circle", "link out")},
    "FIFO": fifo("2DBox_US_bad.npz"), "device": device("2DBox_US_bad.npz"),
}  # fmt: skip
BAD_BOXES = {
    "NaN": [[10, 8, np.nan, 40]], "infinity": [[10, 8, np.inf, 40]], "reversed": [[45, 40, 10, 8]], "outside": [[500, 500, 900, 900]],
    "of 3": [[1, 2, 3]], "of 5": [[1, 2, 3, 4, 5]], "none": np.zeros((0, 4)), "of no size": [[10, 10, 10, 10]], "1e308": [[0, 0, 1e308, 1e308]],
    "letters": [["a", "b", "c", "d"]], "objects": ARRAY([[None] * 4]), "of 3 axes": np.zeros((2, 2, 4)), "one number": 5, "complex": ARRAY([[1j, 1, 2, 3]]),
    "below 0": [[-900, -900, -500, -500]],
}  # fmt: skip
NAMES = {
    "is not UTF-8": os.fsdecode(b"2DBox_US_\xff\xfe"), "clears the screen": "2DBox_US_\x1b[2J\x1b[1;31m", "is a formula": "=cmd|' C calc'!A0",
    "is a tag": "2DBox_US_<script>alert(1)<", "has lines": "2DBox_US_a\nb\r\nc", "has 251 letters": LONG, "is a flag": "-o", "has %": "2DBox_US_%s%n%d",
    "has quotes": "2DBox_US_\"';,", "is ..": "2DBox_US_..", "moves the text": "2DBox_US_\u202egnp", "has braces": "2DBox_US_{0}{x!r}", "has a star": "2DBox_US_[a-z]*?",
}  # fmt: skip
FOREIGN = (
    b"",
    b"x",
    HEAD["text"],
    HEAD["page"],
    HEAD["zeros"],
    b"\x89PNG\r\n\x1a\n",
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"NRRD0004\n",
    b"II*\0",
    b"\xff\xd8\xff",
)


def good_beside(folder: Path, of_npz: bool) -> None:
    """A good case, of the kind that steps 1 and 4 read in one folder with the bad one."""
    case = tiny_case()
    if of_npz:
        save_npz(folder / f"{GOOD_CASE}.npz", **case_arrays())
    else:
        save_image(folder / f"{GOOD_CASE}.png", case.image)
        save_image(folder / f"{GOOD_CASE}_mask.png", case.labels.astype(np.uint8))


def read_by(step: str, make: Callable[[Path], Path], folder: Path, as_mask: bool = False) -> tuple:
    """Step 1 or 4 on a folder that holds the bad file and a good one."""
    cases = folder / "cases"
    cases.mkdir()
    bad = make(cases)
    good_beside(cases, bad.suffix == ".npz")
    if as_mask:  # of a good image of this name
        stem, _, ending = bad.name.partition(".")
        bad.rename(cases / f"{stem}_mask.{ending}")
        IMAGES[ending](cases)
    if step == "1":
        return "01_preprocess.py", "-i", cases, "-o", folder / "cache", "--jobs", "1"
    boxes = () if bad.suffix == ".npz" or (cases / "boxes.csv").exists() else ("--boxes-from-masks",)
    return "04_infer.py", "-i", cases, "-o", folder / "segs", "--model", model(folder), *boxes


def model(folder: Path) -> Path:
    return small_checkpoint(folder / "small.pt")


IMAGES = {
    **{ending: partial(lambda ending, folder: picture(folder, f"US_a.{ending}"), ending) for ending in ("png", "jpg", "bmp")},
    **{ending: partial(lambda ending, folder: nifti(folder, f"CT_a.{ending}"), ending) for ending in ("nii", "nii.gz")},
    **{ending: partial(lambda ending, folder: itk(folder, f"CT_a.{ending}"), ending) for ending in ("mha", "nrrd")},
    "tif": tiff, "mhd": partial(itk, name="CT_a.mhd"), "nhdr": partial(itk, name="CT_a.nhdr"),
}  # fmt: skip
WRITTEN_BY = {
    "1": (f"cache/imgs/{GOOD_CASE}.png", "cache/index.csv"),
    "4": (f"segs/{GOOD_CASE}.npz", "segs/objects.csv"),
}


def bad_files() -> Iterator[Attack]:
    """The rows of test_robust.BAD, which are what is read, or the mask of what is read."""
    for name, make in BAD.items():
        if (
            name.startswith(("PKL", "boxes.csv"))
            or any(ending in name for ending in (".pkl", ".pt", "a is a FIFO"))
            or "bomb" in name
        ):
            continue
        bad = "" if "UTF-8" in name else "a_mask" if "as a mask" in name else "s" if "slice" in name else "a."
        for step in "14":
            if not (step == "1" and name.startswith("COCO")):
                yield Attack(f"step {step}: {name}", partial(read_by, step, make), bad, WRITTEN_BY[step])
        if (
            name.startswith(("NIfTI", "NRRD", "MHA", "PNG", "JPEG", "BMP", "TIFF"))
            and "UTF-8" not in name
            and "FIFO" not in name
        ):
            attack = partial(read_by, "1", make, as_mask=True)
            yield Attack(f"step 1: mask, {name}", attack, "a_mask", WRITTEN_BY["1"])


def files_of_cases() -> Iterator[Attack]:
    for name, make in BAD_NPZ.items():
        for step in "14":
            fine = (
                step == "4"
                and (name.startswith("labels") or "no labels" in name or "spacing" in name)
                or "no boxes" in name
            )
            volume = "volume" in name or "spacing" in name
            if step == "4" and volume:
                continue
            yield Attack(
                f"step {step}: npz {name}",
                partial(read_by, step, make),
                "cases/",
                WRITTEN_BY[step],
                None if fine else True,
            )
    for name, boxes in BAD_BOXES.items():
        make = npz_of(boxes=np.array(boxes))
        yield Attack(f"step 4: boxes {name}", partial(read_by, "4", make), "_bad", WRITTEN_BY["4"])


def spoilt_files() -> Iterator[Attack]:
    for name, make in GOOD.items():
        if name == "npz":
            continue
        bad = "a." + ("dcm" if "DICOM" in name else "")
        for number, content in enumerate(FOREIGN):
            step = "14"[number % 2]
            attack = partial(read_by, step, other_content(make, content))
            yield Attack(f"step {step}: {name} that holds {content[:12]!r}", attack, bad, WRITTEN_BY[step])
        for share in (0.05, 0.3):
            for step in "14":
                yield Attack(
                    f"step {step}: {name} cut at {share}",
                    partial(read_by, step, cut(make, share)),
                    bad,
                    WRITTEN_BY[step],
                )
    for name, letters in NAMES.items():
        for step in "14":
            make = npz_of(f"{letters}.npz", imgs=None)
            yield Attack(
                f"step {step}: a bad file whose name {name}", partial(read_by, step, make), "", WRITTEN_BY[step]
            )
            make = npz_of(f"{letters}.npz")
            yield Attack(
                f"step {step}: a good file whose name {name}", partial(read_by, step, make), "", WRITTEN_BY[step], None
            )


# ---------------------------------------------------------------- step 2: the cache, checkpoints


def training(folder: Path, *more: object) -> tuple:
    plan = ("--steps", "2", "--batch", "1", "--set", "decoder=random", "objects=1")
    return "02_train.py", "--cache", folder / "cache", "--out", folder / "run", *plan, *more


def damaged_cache(damage: Callable[[Path], object], folder: Path) -> tuple:
    damage(tiny_cache(folder / "cache"))
    return training(folder)


def each(pattern: str, make: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Every file of the cache that fits becomes what a function of test_robust.BAD makes."""

    def damage(cache: Path) -> None:
        with TemporaryDirectory() as other:
            for path in cache.glob(pattern):
                path.unlink()
                shutil.move(make(Path(other)), path)

    return damage


def row_of(**changed) -> Callable[[Path], None]:
    def damage(cache: Path) -> None:
        header, first, *others = (cache / "index.csv").read_text().splitlines()
        row = dict(zip(header.split(","), first.split(","), strict=True)) | changed
        written(
            cache / "index.csv",
            "\n".join([header, ",".join(map(str, row.values())), *others]).encode("utf-8", "surrogateescape"),
        )

    return damage


def replaced(name: str, content: bytes | Callable) -> Callable[[Path], None]:
    def damage(cache: Path) -> None:
        (cache / name).unlink()
        written(cache / name, content) if isinstance(content, bytes) else content(name)(cache)

    return damage


def caches() -> Iterator[Attack]:
    rows = {
        "no number": {"height": "x"}, "NaN": {"height": "nan"}, "a height of 0": {"height": 0}, "a height below 0": {"height": -5},
        "a huge height": {"height": 10**30}, "a name outside": {"name": "../../etc/passwd"}, "no such image": {"name": "nothing"},
        "an empty name": {"name": ""}, "a split of its own": {"split": "test"}, "a name of .": {"name": "."}, "a name of 300 letters": {"name": "a" * 300},
        "a name of zero": {"name": "a\0b"}, "objects x": {"objects": "x"}, "low x": {"low": "x"}, "letters not UTF-8": {"name": "\udcff"},
        "a column more": {"window": "1,2,3"}, "a long field": {"window": "1" * 200000},
    }  # fmt: skip
    for name, fields in rows.items():
        yield Attack(
            f"step 2: index.csv with {name}",
            partial(damaged_cache, row_of(**fields)),
            "",
            (),
            True if name not in ("a column more",) else None,
        )
    contents = {
        "empty": b"",
        "text": HEAD["text"],
        "zeros": bytes(5000),
        "binary": bytes(range(256)) * 20,
        "brackets": b"[" * 10**5,
        "header alone": b"name\n",
    }
    for file in ("index.csv", "version.json"):
        for name, content in contents.items():
            yield Attack(
                f"step 2: {file} is {name}",
                partial(damaged_cache, replaced(file, content)),
                file.partition(".")[0] if file != "version.json" else "",
            )
        for name, make in {
            "FIFO": fifo,
            "device": device,
            "folder": lambda name: under(name, "folder"),
            "dead link": lambda name: under(name, "dead link"),
        }.items():
            yield Attack(f"step 2: {file} is a {name}", partial(damaged_cache, replaced(file, make)))
    for version in ("0", "99", "null", '"6"', "[6]", "1e999", "9" * 5000):
        content = b'{"cache": ' + version.encode() + b"}"
        yield Attack(
            f"step 2: a cache of version {version[:9]}", partial(damaged_cache, replaced("version.json", content))
        )
    yield Attack("step 2: no cache", lambda folder: training(folder))
    for name, make in BAD.items():
        if name.startswith("PKL") or ".pkl" in name:
            yield Attack(f"step 2: {name}", partial(damaged_cache, each("masks/*.pkl", make)), "masks/")
        if name.startswith(("PNG", "JPEG")) or "a.png" in name:
            yield Attack(f"step 2: {name}", partial(damaged_cache, each("imgs/*.png", make)), "imgs/")
    others = {
        "no numbers": pickled({"a": 1}), "a shape of (-1, 5)": pickled(((-1, 5), b"")), "a shape of 2^40": pickled(((2**40, 2**40), b"")),
        "runs beyond": pickled(((256, 256), np.array([[0, 70000, 1]], "<i4").tobytes())), "runs below 0": pickled(((256, 256), np.array([[-5, 7, 1]], "<i4").tobytes())),
        "runs that overlap": pickled(((256, 256), np.array([[0, 7, 1], [3, 7, 1]], "<i4").tobytes())), "part of a run": pickled(((256, 256), b"12345")),
        "text": pickled("a"), "an array": pickled(np.zeros(5)), "a name of code": pickled(b"cos\nmkdir\n(S'CODE'\ntR."), "nested": pickled(b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    }  # fmt: skip
    for name, make in others.items():
        yield Attack(f"step 2: PKL of {name}", partial(damaged_cache, each("masks/*.pkl", make)), "masks/")
    small = {
        "of 2 pixels": png_header(2, 2),
        "of another size": lambda folder: save_image(folder / "a.png", PICTURE) and folder / "a.png",
    }
    for name, make in small.items():
        yield Attack(f"step 2: an image {name}", partial(damaged_cache, each("imgs/*.png", make)), "imgs/")


ODD = {
    "none": None,
    "text": "x",
    "a list": [],
    "below 0": -1,
    "NaN": float("nan"),
    "2^70": 2**70,
    "nested": {"a": {"b": []}},
}


@lru_cache
def trained() -> tuple[TemporaryDirectory, Path]:
    """A cache, and a run of two steps on it."""
    place = TemporaryDirectory()
    folder = Path(place.name)
    tiny_cache(folder / "cache")
    assert command(*training(folder)).code == 0
    return place, folder


def resumed(change: Callable[[dict], object], folder: Path) -> tuple:
    shutil.copytree(trained()[1], folder, dirs_exist_ok=True)
    stored = read_checkpoint(folder / "run" / "last.pt")
    save_checkpoint(folder / "run" / "last.pt", change(stored) or stored)
    return training(folder, "--resume")[:5] + ("--steps", "3") + training(folder, "--resume")[7:]


def bad_tensors() -> dict[str, Callable[[dict], object]]:
    first = "image_encoder.weight"

    def to(change: Callable) -> Callable[[dict], object]:
        return lambda stored: stored["model"].__setitem__(first, change(stored["model"][first]))

    return {
        "NaN": to(lambda t: t * float("nan")), "infinity": to(lambda t: t / 0), "integers": to(lambda t: t.int()), "complex": to(lambda t: t.cfloat()),
        "another shape": to(lambda t: t[:1]), "sparse": to(lambda t: t.to_sparse()), "a number": to(lambda t: 5), "text": to(lambda t: "x"), "quantized": to(
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), "meta": to(lambda t: t.to("meta")), "bool": to(lambda t: t.bool()),
        "one lacks": lambda stored: stored["model"].pop(first) is None, "one more": lambda stored: stored["model"].update(x=torch.zeros(1)),
        "kinds of an odd name": lambda stored: stored["model"].update({"mask_decoders.a b/../c.x": torch.zeros(1)}),
        "a kind without a name": lambda stored: stored["model"].update({"mask_decoders.": torch.zeros(1)}),
        "an overlapping view": to(lambda t: torch.zeros(1).expand(t.shape)),
    }  # fmt: skip


def checkpoints() -> Iterator[Attack]:
    keys = (
        "model",
        "architecture",
        "preset",
        "preset_fields",
        "optimiser",
        "schedule",
        "rng",
        "must_match",
        "step",
        "best",
        "log",
        "losses",
    )
    for key in keys:
        for name, value in ODD.items():
            if (key, name) in {("best", "below 0"), ("best", "2^70"), ("preset", "x")}:
                continue
            may = None if key in ("preset", "best", "losses", "log", "architecture", "step") else True
            yield Attack(
                f"step 2: last.pt, {key} is {name}",
                partial(resumed, lambda stored, key=key, value=value: stored.update({key: value})),
                "last.pt",
                (),
                may,
            )
        yield Attack(
            f"step 2: last.pt without {key}",
            partial(resumed, lambda stored, key=key: (stored.pop(key), None)[1]),
            "last.pt",
            (),
            None,
        )
    for field in ("state", "param_groups"):
        for name, value in ODD.items():
            yield Attack(
                f"step 2: last.pt, optimiser's {field} is {name}",
                partial(resumed, lambda stored, field=field, value=value: stored["optimiser"].update({field: value})),
                "last.pt",
            )
    weights = {name: lambda folder, change=change: _changed(folder, change) for name, change in bad_tensors().items()}
    weights |= {
        "payload": lambda folder: _saved(folder, {"model": Payload(folder / "CODE")}), "a list": lambda folder: _saved(folder, [1]),
        "keys that are numbers": lambda folder: _saved(folder, {1: torch.zeros(1)}), "empty dict": lambda folder: _saved(folder, {}),
        "a tensor alone": lambda folder: _saved(folder, torch.zeros(3)), "a plain pickle": lambda folder: written(folder / "bad.pt", pickle.dumps(Payload(folder / "CODE"))),
        "nested": lambda folder: _saved(folder, {"model": {"model": {"model": 5}}}), "a whole module": lambda folder: _saved(folder, torch.nn.Linear(2, 2)),
        "architecture of another": lambda folder: small_checkpoint(folder / "bad.pt", architecture="x\n"), "architecture is a list": lambda folder: small_checkpoint(folder / "bad.pt", architecture=["baseline"]),
        "a preset of its own": lambda folder: small_checkpoint(folder / "bad.pt", preset="x"), "preset is a dict": lambda folder: small_checkpoint(folder / "bad.pt", preset={}),
        "int8 of its own": lambda folder: small_checkpoint(folder / "bad.pt", weight_int8="x"), "int8 is a list": lambda folder: small_checkpoint(folder / "bad.pt", weight_int8=[]),
        "int8 of floats": lambda folder: small_checkpoint(folder / "bad.pt", weight_int8="channel"),
        **{f"of {name}": lambda folder, content=content: written(folder / "bad.pt", content) for name, content in HEAD.items() if isinstance(content, bytes)},
        **{f"cut at {share}": lambda folder, share=share: cut(lambda f: small_checkpoint(f / "bad.pt"), share)(folder) for share in (0, 0.01, 0.3, 0.7, 0.99)},
        "FIFO": fifo("bad.pt"), "device": device("bad.pt"), "folder": under("bad.pt", "folder"), "dead link": under("bad.pt", "dead link"), "circle": under("bad.pt", "circle"),
        "a zip of zeros": lambda folder: zipped(**{"bad/data.pkl": b"\x80\x02}."})(folder).rename(folder / "bad.pt"),
        "safetensors of 2^63": lambda folder: written(folder / "bad.safetensors", b"\xff" * 8 + b"{}"),
        "safetensors beyond its end": lambda folder: written(folder / "bad.safetensors", struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     '),
        "safetensors that is empty": lambda folder: written(folder / "bad.safetensors", b""),
        "safetensors of text": lambda folder: written(folder / "bad.safetensors", HEAD["text"]),
        "onnx": lambda folder: written(folder / "bad.onnx", HEAD["text"]), "static": lambda folder: written(folder / "bad.static", HEAD["text"]),
    }  # fmt: skip
    fine = (
        "an overlapping view",
        "architecture of another",
        "architecture is a list",
        "a preset of its own",
        "preset is a dict",
        "int8 is a list",
    )
    # with decoder=random, step 2 takes the encoder of a checkpoint whose other weights are of another kind
    of_encoder = ("one more", "kinds of an odd name", "a kind without a name", "int8 of its own", "int8 of floats")
    for name, make in weights.items():
        for step, script in {
            "2": lambda f, bad: training(_with_cache(f), "--init", bad),
            "3": quantizing,
            "4": lambda f, bad: inferring(f, "--model", bad),
        }.items():
            may = None if name in fine or step == "2" and name in of_encoder else True
            yield Attack(
                f"step {step}: weights, {name}",
                lambda folder, make=make, script=script: script(folder, make(folder)),
                "",
                (),
                may,
            )


def _with_cache(folder: Path) -> Path:
    tiny_cache(folder / "cache")
    return folder


def _saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "bad.pt")
    return folder / "bad.pt"


def _changed(folder: Path, change: Callable[[dict], object]) -> Path:
    stored = read_checkpoint(small_checkpoint(folder / "bad.pt"))
    change(stored)
    torch.save(stored, folder / "bad.pt")
    return folder / "bad.pt"


def quantizing(folder: Path, weights: Path, *more: object) -> tuple:
    write_case(folder, tiny_case())
    return (
        "03_quantize.py",
        "--model",
        weights,
        "-o",
        folder / "int8.dynamic.pt",
        "-i",
        folder / "imgs",
        "--repeats",
        "1",
        *more,
    )


def inferring(folder: Path, *more: object) -> tuple:
    write_case(folder, tiny_case())
    weights = () if "--model" in more else ("--model", model(folder))
    return "04_infer.py", "-i", folder / "imgs", "-o", folder / "segs", *weights, *more


# ---------------------------------------------------------------- steps 3 and 5: truth and predictions


def evaluating(folder: Path, *more: object) -> tuple:
    case = tiny_case()
    for kind in ("imgs", "gts", "segs"):
        (folder / kind).mkdir(exist_ok=True)
    save_npz(folder / "segs" / f"{GOOD_CASE}.npz", segs=case.labels)
    save_npz(folder / "gts" / f"{GOOD_CASE}.npz", gts=case.labels)
    save_npz(folder / "imgs" / f"{GOOD_CASE}.npz", imgs=case.image, boxes=[[10, 8, 45, 40]])
    return "05_evaluate.py", "-s", folder / "segs", "-g", folder / "gts", "-o", folder / "eval", "--jobs", "1", *more


def scored(where: str, make: Callable[[Path], Path], folder: Path) -> tuple:
    arguments = evaluating(folder)
    name = make(folder / where).name
    for kind in ("gts", "segs"):
        if kind != where:
            whole = volume_of() if name.startswith("3D") else npz_of(name, segs=tiny_case().labels)
            whole(folder / kind)
    return arguments


def truth_and_predictions() -> Iterator[Attack]:
    for name, make in BAD_NPZ.items():
        if (
            "image" in name
            or "neither" in name
            or name in ("no key", "records", "an object array", "empty volume", "volume of 2 axes")
        ):
            continue
        may = None if "spacing" in name or "labels" in name else True
        yield Attack(
            f"step 5: truth, npz {name}",
            partial(scored, "gts", make),
            "_bad",
            ("eval/cases.csv",),
            True if name != "spacing is an object" else None,
        )
        if not name.startswith(("labels", "no labels", "spacing")):
            yield Attack(
                f"step 5: prediction, npz {name}", partial(scored, "segs", make), "_bad", ("eval/cases.csv",), may
            )
        if not name.startswith("spacing"):
            yield Attack(
                f"step 3: truth, npz {name}",
                partial(_scored_by_3, make),
                "_bad",
                ("int8.dynamic.pt", "int8.dynamic.json"),
                True,
            )
    case = tiny_case()
    predictions = {
        "no key": {"x": case.labels}, "another shape": {"segs": case.labels[1:]}, "floats": {"segs": case.labels * 1.5}, "below 0": {"segs": case.labels.astype(int) - 5},
        "too high": {"segs": case.labels.astype(int) * 10**6}, "other labels": {"segs": (case.labels > 0) * 77}, "3 axes": {"segs": case.labels[None]}, "NaN": {"segs": case.labels * np.nan},
        "letters": {"segs": np.array(["a"])}, "objects": {"segs": np.array([{}])}, "empty": {"segs": np.zeros((0, 0), int)}, "complex": {"segs": case.labels * 1j},
    }  # fmt: skip
    for name, arrays in predictions.items():
        make = npz_of(**dict.fromkeys(("imgs", "gts", "boxes")), **arrays)
        yield Attack(f"step 5: prediction of {name}", partial(scored, "segs", make), "_bad", ("eval/cases.csv",))
    for name, letters in NAMES.items():
        make = npz_of(f"{letters}.npz", gts=np.zeros((64, 64), int))
        yield Attack(f"step 5: a bad truth whose name {name}", partial(scored, "gts", make), "", ("eval/cases.csv",))
        make = npz_of(f"{letters}.npz", segs=case.labels)
        yield Attack(
            f"step 5: a good truth whose name {name}", partial(scored, "gts", make), "", ("eval/cases.csv",), None
        )
    times = {"empty": b"", "text": HEAD["text"], "zeros": bytes(5000), "no number": b"case,total_s\na.npz,x\n", "a row short": b"case,total_s\na.npz\n", "not UTF-8": b"case,total_s\n\xff,1\n",
             "NaN": b"case,total_s\na.npz,nan\n", "1e999": f"case,total_s\n{GOOD_CASE}.npz,1e999\n".encode(), "a long field": b"case,total_s\n" + b"a" * 200000 + b",1\n"}  # fmt: skip
    for name, content in times.items():

        def make(folder: Path, content=content) -> tuple:
            arguments = evaluating(folder)
            written(folder / "segs" / "efficiency.csv", content)
            return arguments

        yield Attack(
            f"step 5: efficiency.csv of {name}",
            make,
            "efficiency",
            (),
            None if name in ("empty", "NaN", "1e999") else True,
        )
    yield Attack(
        "step 5: efficiency.csv is a FIFO",
        lambda folder: (evaluating(folder), fifo("efficiency.csv")(folder / "segs"))[0],
        "",
        (),
        None,
    )
    for name, make in (BAD_NPZ | {}).items():
        if "image" in name or name in ("FIFO", "device", "folder", "cut at 0.5", "claims 2^62", "an object array"):

            def attack(folder: Path, make=make) -> tuple:
                arguments = evaluating(folder, "--images", folder / "imgs")
                (folder / "imgs" / f"{GOOD_CASE}.npz").unlink()
                bad = make(folder / "imgs")
                bad.rename(folder / "imgs" / f"{GOOD_CASE}.npz")
                return arguments

            yield Attack(f"step 5: figures, npz {name}", attack, "", (), None if name in ("image of 0 to 1",) else True)


def _scored_by_3(make: Callable[[Path], Path], folder: Path) -> tuple:
    arguments = quantizing(folder, model(folder))
    name = make(folder / "gts").name
    save_npz(folder / "imgs" / name, imgs=tiny_case().image, boxes=[[10, 8, 45, 40]])
    return arguments


# ---------------------------------------------------------------- flags

NUMBERS = (
    "",
    "x",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e999",
    "1.5",
    "1" * 5000,
    "0x10",
    "１",
    "\x1b[2J",
    os.fsdecode(b"\xff"),
    "=cmd",
)
PATHS = (
    "",
    "MISSING",
    "FILE",
    "FOLDER",
    "FIFO",
    "a" * 255,
    "a" * 5000,
    os.fsdecode(b"\xff"),
    "\x1b[2J",
    "-",
    "/dev/zero",
    "LOCKED/x",
    "/proc/self/mem",
    "nul\tl",
)
WORDS = ("", "x", "=", "a=", "=a", "window=", "window=nan", "window=inf/1", "window=-1/1", "window=1e999/0", "modality=../x", "modality=x", "smallest=-1", "smallest=9" + "9" * 5000,
         "instances=maybe", "dataset=x", "dataset=../..", os.fsdecode(b"\xff=\xff"), "\x1b[2J=1", "window=CT", "x" * 5000)  # fmt: skip
SETTINGS = ("", "x", "x=1", "=", "epochs=", "epochs=nan", "epochs=-1", "learning_rate=nan", "learning_rate=inf", "learning_rate=-1", "learning_rate=1e999", "objects=0", "objects=-1",
            "objects=1e9", "jitter=nan", "sampling=x", "flips=maybe", "pad=", os.fsdecode(b"\xff=1"), "epochs=" + "9" * 5000, "preset=x", "name=x")  # fmt: skip
FLAGS = {
    "1": {"-i": PATHS, "--masks": PATHS, "-o": PATHS, "--val": PATHS, "--exclude": PATHS, "--val-share": NUMBERS, "--seed": NUMBERS, "--jobs": (*NUMBERS, "tcp://", "9" * 30), "--read": WORDS},
    "2": {"--cache": PATHS, "--out": PATHS, "--init": PATHS, "--model": WORDS[:4], "--preset": WORDS[:4], "--set": SETTINGS, "--steps": NUMBERS, "--batch": (*NUMBERS, "9" * 12), "--validate-every": NUMBERS,
          "--seed": (*NUMBERS, "9" * 30)},
    "3": {"--model": PATHS, "--preset": (*WORDS[:4], *SETTINGS), "-i": PATHS, "-o": PATHS, "--repeats": NUMBERS},
    "4": {"-i": PATHS, "-o": PATHS, "--box": NUMBERS, "--boxes": (*NUMBERS, "exact drawn", "1e308"), "--model": PATHS, "--preset": SETTINGS, "--engine": (*WORDS[:5], "torch x=1", "openvino precision=x", "openvino threads=0", "onnx"), "--read": WORDS},
    "5": {"-s": (*PATHS, "a=", "=b", "a=b=c", "filled box=FOLDER"), "-g": PATHS, "-o": PATHS, "--protocol": WORDS[:4], "--jobs": (*NUMBERS[:-4], "9" * 30), "--looseness": NUMBERS, "--images": PATHS, "--figures": (*WORDS[:4], "x" * 5000), "--show": WORDS[:4]},
}  # fmt: skip


def flagged(step: str, flag: str, value: str, folder: Path) -> tuple:
    """A good command, and one flag with a bad value."""
    (folder / "some").mkdir()
    places = {
        "MISSING": folder / "missing",
        "FILE": written(folder / "some" / "file", b"text"),
        "FOLDER": folder / "some",
        "FIFO": fifo("pipe")(folder / "some"),
    }
    (folder / "some" / "locked").write_bytes(b"")
    for word, place in places.items():
        value = value.replace(word, os.fspath(place)) if isinstance(value, str) else value
    value = value.replace("LOCKED", os.fspath(folder / "some" / "locked"))
    if step == "1":
        write_training_case(folder / "train", tiny_case())
        write_training_case(folder / "train", tiny_case(1))
        arguments = ["01_preprocess.py", "-i", folder / "train", "-o", folder / "cache", "--jobs", "1"]
    elif step == "2":
        arguments = list(training(_with_cache(folder)))
    elif step == "3":
        arguments = list(quantizing(folder, model(folder)))
    else:
        arguments = list(inferring(folder) if step == "4" else evaluating(folder))
    words = value.split(" ") if flag in ("--engine", "--boxes") and value else [value]
    if flag == "--box":
        words = ["1", "1", value, "9"]
    if flag == "--figures":
        arguments += ["--images", folder / "imgs"]
    if flag in arguments:
        at = arguments.index(flag)
        arguments[at + 1 : at + 2] = words
        return tuple(arguments)
    return (*arguments, flag, *words)


def flags() -> Iterator[Attack]:
    for step, table in FLAGS.items():
        for flag, values in table.items():
            for value in values:
                told = f"{value[:30]!r}{f', {len(value)} letters' * (len(value) > 30)}"
                yield Attack(f"step {step}: {flag} {told}", partial(flagged, step, flag, value), "", (), None)


# ---------------------------------------------------------------- the answers


@lru_cache
def normal(script: str) -> Done:
    """The same script with good input."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_training_case(folder / "train", tiny_case())
        arguments = {
            "01_preprocess.py": lambda: ("01_preprocess.py", "-i", folder / "train", "-o", folder / "cache", "--jobs", "1"),
            "02_train.py": lambda: training(_with_cache(folder)), "03_quantize.py": lambda: quantizing(folder, model(folder)),
            "04_infer.py": lambda: inferring(folder), "05_evaluate.py": lambda: evaluating(folder),
        }[script]()  # fmt: skip
        done = command(*arguments)
        assert done.code == 0 and not done.err.count("Traceback"), done
        return done


def catalogue() -> list[Attack]:
    found = [
        *bad_files(),
        *files_of_cases(),
        *spoilt_files(),
        *caches(),
        *checkpoints(),
        *truth_and_predictions(),
        *flags(),
    ]
    return list({attack.name: attack for attack in found}.values())


def snapshot(folder: Path) -> dict:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def faults_of(attack: Attack) -> list[str]:
    """What is wrong with the answer to a bad input; [] for a good answer."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "here"
        folder.mkdir()
        with catch_warnings(action="ignore"):
            arguments = attack.make(folder)
        before, usual = snapshot(folder), normal(arguments[0])
        done = command(*arguments)
        after = snapshot(folder)
        changed = [path.name for path, time in before.items() if after.get(path) != time and "run" not in path.parts]
        half = [path.name for path in after if path.name.endswith(".tmp")] + done.left * (not done.signal)
        missing = [pattern for pattern in attack.kept if not any(folder.glob(pattern))]
        ran = list(Path(place).rglob("CODE")) or "CODE" in done.left
    there = {
        f"ended by {done.signal}": done.signal,
        f"took {done.cpu:.1f} s, usual are {usual.cpu:.1f}": done.cpu > usual.cpu + MORE_SECONDS,
        f"held {done.mib} MiB, usual are {usual.mib}": done.mib > usual.mib + MORE_MIB,
        f"lost: {', '.join(missing)}": missing,
        f"changed an input: {changed[:1]}": changed,
        f"half-written: {half[:1]}": half,
        "RAN CODE": ran,
    }
    return [told for told, is_so in there.items() if is_so] or wrong_words(attack, done)


def wrong_words(attack: Attack, done: Done) -> list[str]:
    """What is wrong with exit code and sentences."""
    lines = done.sentences()
    if "Traceback (most recent call last)" in done.err + done.out:
        return [f"traceback: {done.err.strip().splitlines()[-1][:160]}"]
    if attack.fails and done.code == 0:
        return ["exit code 0" if lines else "taken without a word"]
    if done.code and not lines:
        return ["failed without a sentence"]
    # argparse, exit code 2, repeats the words that it was given
    if done.code != 2 and (odd := [x for x in lines if len(x) > MOST_LETTERS + PREFIX or not x.isprintable()]):
        return [f"a sentence that is too long, or can't be printed: {odd[0][:100]!r}"]
    named = [line for line in lines if attack.bad in line]
    if attack.bad and done.code and len(named) != 1:
        return [f"{len(named)} sentences name it: {lines[:2]}"[:300]]
    return []


def differs_as_proper_command(attack: Attack) -> str:
    """What a command proper answers otherwise than a fork, of a script that loads no network; "" if nothing."""
    with TemporaryDirectory() as place, catch_warnings(action="ignore"):
        folders = [Path(place) / name for name in ("here", "away")]
        ends = []
        for folder, run in zip(folders, (command, proper_command), strict=True):
            folder.mkdir()
            arguments = attack.make(folder)
            if arguments[0] not in ("01_preprocess.py", "05_evaluate.py"):
                return ""
            done = run(*arguments)
            ends.append((done.code, [line.replace(str(folder), "FOLDER") for line in done.sentences()]))
        return "" if ends[0] == ends[1] else f"a fork and a command end in two ways: {ends}"[:300]
