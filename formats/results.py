"""What step 4 is asked for, and what it writes: label maps in the formats that viewers open, and tables.

NAME.npz         `segs`, the label map, as the challenge has it
NAME.nii.gz      on the input's own grid, for a case that says where it lies (NIfTI, DICOM, NRRD, MHA);
                 NAME.nrrd if its slices are sheared
NAME_seg.dcm     beside it, for a DICOM series: the objects as segments, which may overlap
NAME_mask.png    for pictures: indexed, so that objects have a colour each and the value of a pixel is
                 its object's number; 16 bit gray above 255 objects; a .tif of pages for a TIFF of pages
"""

import gzip
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from formats import DICOM_ENDINGS, InputError
from formats.case import Case, told_in_a_sentence
from formats.readers import ending_of, imported, list_cases, name_of, read_boxed, window_of
from formats.writing import (
    check_folder,
    csv_text,
    progress,
    save_bytes,
    save_image,
    save_json,
    save_npz,
    save_text,
    tell,
)
from grid import label_ids

OBJECT_COLUMNS = ("case", "label", "name", "box", "boxes_are", "pixels", "mm3", "predicted_iou", "seconds", "note")
# What a NIfTI mask takes from the header of its scan: both places with their codes, units, intent
KEPT = (
    "pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z "
    "xyzt_units intent_code intent_p1 intent_p2 intent_p3 intent_name"
)
COVERED = 0.5  # an object of which others hide this share or more is named in a warning


class Job:
    """The cases that step 4 is asked for, and what it has made of them so far.

    arguments: its flags by name. InputError if one of them cannot be used, or if results would replace something.
    """

    def __init__(self, arguments: dict) -> None:
        self.arguments = told_apart(arguments)
        self.source, self.folder, self.boxes = arguments["input"], arguments["output"], arguments["box"]
        self.looseness, self.boxes_are = self.arguments["boxes_from_masks"], self.arguments["boxes"]
        none_given = not self.boxes and self.looseness is None
        self.files = files_to_do(self.source, self.folder, "--box" if self.boxes else "", with_boxes=none_given)
        self.window = window_of(arguments["read"])
        self.rows, self.objects, self.names = [], [], []  # of efficiency.csv, of objects.csv, files of the last case

    def paths(self) -> Iterable[Path]:
        """The file of each case."""
        return progress(self.files, "cases", unit="case")

    @contextmanager
    def or_left_out(self, path: Path) -> Iterator[None]:
        """What is done with one case. Whatever is raised there is told on stderr, and the case left out."""
        try:
            with told_in_a_sentence(path):
                yield
        except InputError as error:
            if path == self.source:
                raise
            # an earlier run's result would be taken for this one's
            for ending in (".npz", ".nii.gz", ".nrrd", "_mask.png", "_mask.tif", "_seg.dcm"):
                with suppress(OSError):
                    (self.folder / f"{name_of(path)}{ending}").unlink(missing_ok=True)
            tell(f"04_infer.py: left out: {error}", error=True)

    def read(self, path: Path) -> Case:
        """A case with its boxes."""
        case = read_boxed(path, self.boxes, self.looseness, self.window)
        return replace(case, boxes_are=self.boxes_are or case.boxes_are)

    def numbers(self, case: Case) -> np.ndarray:
        """The label (N,) of each box: i + 1 of box i, but of a box that was made of a mask the mask's own."""
        # objects with names are labels 1, 2, ..., also one that others hide, or that has a box alone
        is_counted = self.looseness is None or len(case.label_names or ()) == len(case.boxes)
        return np.arange(1, len(case.boxes) + 1) if is_counted else label_ids(case.labels)

    def save(self, path: Path, case: Case, found, palette: np.ndarray):
        """Write the label map of a case.   found: volumes.Found. -> the same with `numbers` in the label map"""
        if self.looseness is not None:
            found = found._replace(labels=np.append(0, self.numbers(case)).astype(np.uint16)[found.labels])
        parts = [(self.numbers(case)[i], z, mask) for i, z, mask in found.parts]
        self.names = save_label_map(self.folder, case, found.labels, path, palette, parts)
        return found

    def note(self, case: Case, found, seconds: dict[str, float]) -> None:
        """Rows of the tables.   seconds: where the time of the case went."""
        shape = "x".join(map(str, case.image.shape))
        row = {"case": f"{case.name}.npz", "modality": case.modality, "shape": shape, "objects": len(case.boxes)}
        row["boxes_are"] = case.boxes_are
        self.rows.append(row | seconds)
        segmenting = seconds["total_s"] - seconds["read_s"] - seconds["write_s"]
        self.objects += object_rows(case, found, self.numbers(case), segmenting)

    def picture(self, path: Path, case: Case) -> Path | None:
        """The file for a picture of the result; none for a folder of the challenge's cases, which has no pictures."""
        if path != self.source and path.suffix == ".npz":
            return None
        self.names.append(f"{case.name}_overlay.png" if path == self.source else f"overlays/{case.name}.png")
        return self.folder / self.names[-1]

    def finish(self, segmenter) -> list[dict]:
        """Write the tables, and say what was done and what comes next. -> the rows of efficiency.csv

        segmenter: segment.Segmenter. It asks for boxes of a kind that it has no decoder for as if they were exact.
        InputError if cases were left out.
        """
        folder, done, count = self.folder, len(self.rows), len(self.files)
        if self.rows:
            save_text(folder / "efficiency.csv", csv_text(self.rows, tuple(self.rows[0]), number=".4f"))
            save_text(folder / "objects.csv", csv_text(self.objects, OBJECT_COLUMNS))
            save_json(folder / "arguments.json", self.arguments | {"preset_fields": vars(segmenter.preset)})
        if done < count:
            raise InputError(f"{done} of {count} cases done, {count - done} left out as told above.")
        kinds = Counter(o["boxes_are"] for o in self.objects)
        found = (f"{n} {kind}" if len(kinds) > 1 else kind for kind, n in kinds.items())
        known = kinds.keys() <= {*segmenter.engine.kinds}
        told = f"boxes {', '.join(found)}{'' if known else ' (asked as exact)'}"
        if self.files == [self.source]:
            line = "object {label}: {pixels} pixels, predicted IoU {predicted_iou}"
            lines = ", ".join(line.format(**one) for one in self.objects)
            told = f"{lines}; {told}; wrote {', '.join(self.names)} and objects.csv to {folder}"
        else:
            seconds = sum(row["total_s"] for row in self.rows)
            after = f"wrote {folder}. Next: python 05_evaluate.py -s {folder} -g GROUND_TRUTH"
            if self.arguments["smoke"]:
                after = "results removed again. Next: python 05_evaluate.py --smoke"
            told = f"{done} cases, {len(self.objects)} objects in {seconds:.1f} s, {told}, {after}"
        tell(f"04_infer.py: {told}")
        return self.rows


def told_apart(arguments: dict) -> dict:
    """Step 4's flags by name, what --boxes says as two of them: `boxes`, a kind of segment.BOX_KINDS, and
    `boxes_from_masks`, a share by which boxes of labels are loosened; None for what it does not say. Or InputError.

    >>> told_apart({"boxes": ["0.1", "drawn"], "box": None, "page": False})
    {'boxes': 'drawn', 'box': None, 'page': False, 'boxes_from_masks': 0.1}
    """
    shares = [text for text in arguments["boxes"] if text.lstrip("-").replace(".", "", 1).isdecimal()]
    kinds = [text for text in arguments["boxes"] if text not in shares]
    if shares and (arguments["box"] or arguments["page"]):
        other = "--box" if arguments["box"] else "--page"
        raise InputError(f"--boxes-from-masks: not allowed with argument {other}; leave out one of the two")
    share = float(shares[-1]) if shares else None
    if not 0 <= (share or 0) < np.inf:
        raise InputError(f"--boxes-from-masks {share:g}: a looseness is 0 or more")
    return arguments | {"boxes": kinds[-1] if kinds else None, "boxes_from_masks": share}


def files_to_do(source: Path | None, folder: Path, one: str, with_boxes: bool) -> list[Path]:
    """The cases of a file or folder that was named. InputError if results in `folder` would replace something.

    one: the flag, "" for none, that asks for a single case.   with_boxes: see `list_cases`.
    """
    if source is None:
        raise InputError("name the input: -i FOLDER, or -i IMAGE --box X0 Y0 X1 Y1, or --smoke")
    alone = source.is_file() or (ending_of(source) and not source.is_dir())
    files = [source] if alone else list_cases(source, with_boxes)
    if one and len(files) > 1:
        raise InputError(f"{source}: {one} takes one image or volume; {len(files)} are here: name one")
    if folder.resolve() in (source.resolve(), files[0].parent.resolve()):
        what = "the same folder as the input's; results would replace files of yours"
        raise InputError(f"{folder}: {what}: name another")
    check_folder(folder)
    name, count = Counter(map(name_of, files)).most_common(1)[0]
    if count > 1:
        raise InputError(f"{source}: holds {name} in {count} formats, and each would give {name}.npz; rename one")
    return files


def save_label_map(
    folder: Path, case: Case, labels: np.ndarray, source: Path, palette: np.ndarray, parts=()
) -> list[str]:
    """Write the label map of a case, (H, W) or (D, H, W) uint16, read from `source`. -> names of the files

    palette: (n, 3) RGB, the colours of labels 1, 2, ..., over and over.   parts: see `dicom_out.save_segmentation`.
    """
    # 8 bits where they hold every label, as the challenge's own files; 16 above 255 objects (D9)
    small = labels.astype(np.uint8) if labels.max() <= 255 else labels
    save_npz(folder / f"{case.name}.npz", segs=small)
    if source.suffix == ".npz":  # the challenge asks for nothing else, and its clock is running
        return [f"{case.name}.npz"]
    name, more = f"{case.name}_mask.png", []
    if case.affine is not None:
        like = source if source.name.lower().endswith((".nii", ".nii.gz")) else None
        name = save_nifti_labels(folder / f"{case.name}.nii.gz", labels, case.affine, like).name
        if source.is_dir() or ending_of(source) in (None, *DICOM_ENDINGS):
            save_segmentation = imported("formats.dicom_out:save_segmentation")
            more = save_segmentation(folder / f"{case.name}_seg.dcm", case, labels, source, parts)
    elif case.is_3d:
        name = f"{case.name}_mask.tif"
        save_bytes(folder / name, cv2.imencodemulti(".tif", list(small))[1].tobytes())
    elif small.dtype == np.uint8:
        from PIL import Image  # OpenCV writes no palettes

        picture, content = Image.fromarray(small), io.BytesIO()
        colours = palette[np.arange(255) % len(palette)]
        picture.putpalette(np.concatenate([[[0, 0, 0]], colours]).astype(np.uint8).tobytes())
        picture.save(content, "PNG")
        save_bytes(folder / name, content.getvalue())
    else:
        save_image(folder / name, small)
    return [f"{case.name}.npz", name, *more]


def save_nifti_labels(path: Path, labels: np.ndarray, affine: np.ndarray, like: Path | None = None) -> Path:
    """Write a label map (D, H, W) or (H, W) as .nii.gz. -> the file

    affine: of the case.   like: the NIfTI file that the case was read from. The label map then has its grid, axis
    by axis, and what KEPT names, so that any viewer lays one over the other.
    NIfTI is for right angles (a qform): a volume sheared by a tilted gantry is written as .nrrd instead.
    """
    import nibabel  # only here: most cases have no affine

    from formats.scans import NEAR, apart, spacing_of_affine, turn_back, view_of

    volume = labels if labels.ndim == 3 else labels[None]
    small = volume.astype(np.uint8 if volume.max() <= 255 else np.uint16)
    if like is None:
        image = nibabel.Nifti1Image(small.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)  # the nearest one of right angles, which ITK takes where the sform has others
        if apart(image.get_qform(), affine, image.shape) > NEAR:
            path = path.with_name(path.name.removesuffix(".nii.gz") + ".nrrd")
            tell(f"{path}: is NRRD, as its slices are sheared (a tilted gantry?): ITK opens no such NIfTI", error=True)
            save_bytes(path, nrrd_bytes(small, affine))
            return path
    else:
        source = nibabel.load(like)
        voxels = turn_back(small, view_of(source.affine)).reshape(source.shape[:3])
        # few programs read NIfTI-2, which is for longer axes
        image = (nibabel.Nifti1Image if max(voxels.shape) < 2**15 else nibabel.Nifti2Image)(voxels, None)
        for field in KEPT.split():
            image.header[field] = source.header[field]
        cosines = source.affine[:3, :3] / spacing_of_affine(source.affine)
        if not image.header["qform_code"] and np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-4:
            why_not = f"{like.name} has axes that are not at right angles and no qform: ITK's viewers open neither"
            tell(f"{path}: {why_not}; resample it for them", error=True)
    # level 1: a higher one is slower and hardly smaller. No time in it: the same bytes each run
    save_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    return path


def nrrd_bytes(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """An NRRD file of a volume (D, H, W) uint8 or uint16.   affine: RAS+, of voxels (x, y, z), mm; it may shear."""
    vectors = ["(" + ",".join(map(repr, column)) + ")" for column in affine[:3].T.tolist()]
    header = f"""NRRD0004
type: {volume.dtype}
dimension: 3
space: right-anterior-superior
sizes: {" ".join(map(str, volume.shape[::-1]))}
space directions: {" ".join(vectors[:3])}
kinds: domain domain domain
endian: little
encoding: gzip
space origin: {vectors[3]}

"""
    return header.encode() + gzip.compress(volume.astype(volume.dtype.newbyteorder("<")).tobytes(), 1, mtime=0)


def object_rows(case: Case, found, numbers: np.ndarray, seconds: float | None) -> list[dict]:
    """A row of OBJECT_COLUMNS for each box of a case. A warning names those that came out empty or covered.

    found: volumes.Found.   numbers: (N,) the label that each box painted.   seconds: of the whole case, of which each
    object is given an equal share; None if not measured. pixels (in a volume: voxels) and mm3 count what an
    object has in the label map; what another one covers is not its own.
    """
    # plane by plane: bincount takes 8 bytes a pixel
    planes = found.labels.reshape(-1, *found.labels.shape[-2:])
    visible = sum(np.bincount(plane.ravel(), minlength=int(numbers.max()) + 1) for plane in planes)
    # of one voxel: the determinant is right where slices are sheared, too
    size = abs(np.linalg.det(case.affine[:3, :3])) if case.affine is not None else np.prod(case.spacing_mm or 0)
    share = "" if seconds is None else f"{seconds / len(numbers):.4f}"
    rows, told = [], []
    for i, (label, own) in enumerate(zip(numbers.tolist(), found.own, strict=True)):
        name = case.label_names[label - 1] if label <= len(case.label_names or ()) else ""
        box = " ".join(f"{value:g}" for value in case.boxes[i])
        pixels, covered = int(visible[label]), 1 - visible[label] / max(1, own)
        mm3 = f"{pixels * size:.1f}" if case.spacing_mm else ""
        note = "empty" if own == 0 else f"{100 * covered:.0f} % covered by others" if covered > 0.005 else ""
        values = (f"{case.name}.npz", label, name, box, case.boxes_are, pixels, mm3, f"{found.iou[i]:.3f}", share, note)
        rows.append(dict(zip(OBJECT_COLUMNS, values, strict=True)))
        if own == 0 or covered >= COVERED:
            told.append(f"{label} ({note})")
    if told:
        objects = ", ".join(told[:5]) + f" and {len(told) - 5} more" * (len(told) > 5)
        tell(f"04_infer.py: {case.name}.npz: look at object {objects}; move their boxes, or give fewer", error=True)
    return rows
