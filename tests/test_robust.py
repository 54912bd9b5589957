"""Damaged and hostile files: each gives one sentence, soon, without much memory; or the pixels of the whole file.

A row of BAD makes one file, and is read in a process of its own: that process must not be killed, hang, fill the
memory, raise anything but InputError, or give other pixels than the undamaged file. Sentences have at most 300 characters.
"""

import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from data import load_mask
from demo_data import tiny_case
from formats import InputError
from formats.checkpoints import export_checkpoint, load_weights, read_checkpoint, save_checkpoint
from formats.readers import read_boxed, read_case
from formats.writing import save_image, save_npz

ROOT = Path(__file__).parent.parent
SECONDS, MOST_MIB, MOST_LETTERS = 10, 300, 300
RNG = np.random.default_rng(0)
VOXELS = (RNG.random((24, 20, 8)) * 1000).astype(np.int16)  # x, y, z
PICTURE = cv2.GaussianBlur(RNG.integers(0, 255, (64, 80, 3), np.uint8), (5, 5), 2)


# ---------------------------------------------------------------- good files


def nifti(folder, name="CT_a.nii.gz", voxels=VOXELS):
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / name)
    return folder / name


def itk(folder, name, packed=True):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOXELS.T.copy()), str(folder / name), packed)
    return folder / name


def deflated_dicom(folder, **fields):
    one = pydicom.Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = fields.pop("syntax", DeflatedExplicitVRLittleEndian)
    one.SOPClassUID, one.SOPInstanceUID, one.Modality, one.SeriesInstanceUID = (
        CTImageStorage,
        generate_uid(),
        "MR",
        "1.2",
    )
    one.Rows, one.Columns, one.BitsAllocated, one.BitsStored, one.HighBit = 24, 20, 16, 16, 15
    one.PixelRepresentation, one.SamplesPerPixel, one.PhotometricInterpretation = 0, 1, "MONOCHROME2"
    one.ImageOrientationPatient, one.ImagePositionPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [0, 0, 0], [1, 1]
    one.PixelData = VOXELS[..., 0].astype(np.uint16).tobytes()
    for key, value in fields.items():
        setattr(one, key, value)
    pydicom.dcmwrite(folder / "a.dcm", one, enforce_file_format=True)
    return folder / "a.dcm"


def tiff(folder, pages=8, **options):
    tifffile.imwrite(folder / "CT_a.tif", VOXELS.T.astype(np.uint8)[:pages], photometric="minisblack", **options)
    return folder / "CT_a.tif"


def picture(folder, name):
    (folder / name).write_bytes(cv2.imencode(Path(name).suffix, PICTURE)[1].tobytes())
    return folder / name


GOOD = {
    "NIfTI, gzip": nifti,
    "NIfTI": lambda folder: nifti(folder, "CT_a.nii"),
    "MHA, zlib": lambda folder: itk(folder, "CT_a.mha"),
    "MHA": lambda folder: itk(folder, "CT_a.mha", False),
    "NRRD, gzip": lambda folder: itk(folder, "CT_a.nrrd"),
    "DICOM, deflated": deflated_dicom,
    "DICOM": lambda folder: deflated_dicom(folder, syntax=ExplicitVRLittleEndian),
    "TIFF": tiff,
    "TIFF, zlib": lambda folder: tiff(folder, compression="zlib"),
    "TIFF, plain pages": lambda folder: tiff(folder, metadata=None),
    "TIFF, ImageJ": lambda folder: tiff(folder, imagej=True, metadata={"axes": "ZYX"}),
    "PNG": lambda folder: picture(folder, "US_a.png"),
    "JPEG": lambda folder: picture(folder, "US_a.jpg"),
    "BMP": lambda folder: picture(folder, "US_a.bmp"),
    "npz": lambda folder: (
        save_npz(folder / "2D_a.npz", imgs=PICTURE, gts=PICTURE[..., 0] // 100) or folder / "2D_a.npz"
    ),
}
# A deflated DICOM file has none: a changed byte that still unpacks cannot be seen
WITH_CHECKSUM = [name for name in GOOD if name in ("PNG", "npz") or "gzip" in name or "zlib" in name]


# ---------------------------------------------------------------- bad ones: one function each, which returns what to read


def written(path, content):
    path.write_bytes(content)
    return path


def nifti_header(shape, packed, dtype=np.float64, filling=4000):
    def make(folder):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(dtype)
        header.set_data_shape(shape)
        content = header.binaryblock + bytes(4 + filling)
        return written(folder / f"CT_a.nii{packed * '.gz'}", gzip.compress(content) if packed else content)

    return make


def nrrd_header(text, name="CT_a.nrrd", data=bytes(4000)):
    return lambda folder: written(folder / name, f"NRRD0004\n{text}\n\n".encode() + data)


def mha_header(text, name="CT_a.mha", data=bytes(4000)):
    return lambda folder: written(folder / name, f"ObjectType = Image\n{text}\n".encode() + data)


def fifo(name):
    def make(folder):
        os.mkfifo(folder / name)
        return folder / name

    return make


def device(name):
    def make(folder):
        (folder / name).symlink_to("/dev/zero")
        return folder / name

    return make


def png_header(width, height, depth=8, colour=2):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    return lambda folder: written(folder / "US_a.png", content)


def jpeg_header(width, height):
    def make(folder):
        content = bytearray(cv2.imencode(".jpg", PICTURE)[1].tobytes())
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
        return written(folder / "US_a.jpg", bytes(content))

    return make


def npz_bomb(shape, claims=None, dtype="|u1"):
    def make(folder):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": claims or shape})
        with zipfile.ZipFile(folder / "2D_a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            with file.open("imgs.npy", "w", force_zip64=True) as member:
                member.write(head.getvalue())
                for _ in range(shape[0]):
                    member.write(bytes(int(np.prod(shape[1:]))))
            file.writestr("boxes.npy", b"")
        return folder / "2D_a.npz"

    return make


def tiff_claim(shape, pages=1):
    def make(folder):
        content, at = [b"II*\0" + struct.pack("<I", 8)], 8
        for page in range(pages):
            tags = [(256, 4, shape[1]), (257, 4, shape[0]), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8)]
            tags += [(277, 3, 1), (278, 4, shape[0]), (279, 4, 8)]
            at += 2 + 12 * len(tags) + 4
            entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
            content.append(struct.pack("<H", len(tags)) + entries + struct.pack("<I", at if page < pages - 1 else 0))
        return written(folder / "CT_a.tif", b"".join(content))

    return make


def coco(counts=None, size=(64, 80), **fields):
    def make(folder):
        save_image(folder / "US_a.png", PICTURE)
        one = {"image_id": 1, "segmentation": {"size": list(size), "counts": counts}, "category_id": 1} | fields
        content = {"images": [{"id": 1, "file_name": "US_a.png", "height": 64, "width": 80}], "annotations": [one]}
        (folder / "a.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "x"}]}))
        return folder / "US_a.png"

    return make


def supervisely(folder, exterior):
    save_image(folder / "US_a.png", PICTURE)
    content = {"size": {"height": 64, "width": 80}, "objects": [{"points": {"exterior": exterior}}]}
    (folder / "US_a.png.json").write_text(json.dumps(content))
    return folder / "US_a.png"


def series(position):
    def make(folder):
        (folder / "s").mkdir()
        for z in range(4):
            at = [0, 0, position if z == 2 else z]
            deflated_dicom(folder, syntax=ExplicitVRLittleEndian, ImagePositionPatient=at).rename(folder / f"s/{z}.dcm")
        return folder / "s"

    return make


def pickled(content):
    return lambda folder: written(folder / "a.pkl", content if isinstance(content, bytes) else pickle.dumps(content))


NRRD = "type: short\ndimension: {}\nsizes: {}\nencoding: {}\nendian: little"
MHA = "NDims = {}\nDimSize = {}\nElementType = MET_SHORT\nElementDataFile = {}"
BAD = {
    "NIfTI claims 8 GB": nifti_header((1000, 1000, 1000), True),
    "NIfTI, a bomb of 100 MB": nifti_header((500, 500, 50), True, filling=10**8),
    "NIfTI, a bomb behind the voxels": nifti_header((5, 5, 5), True, filling=10**8),
    "NIfTI claims 32767^3": nifti_header((32767, 32767, 32767), False),
    "NIfTI has negative sizes": lambda folder: written(
        folder / "CT_a.nii", nifti(folder, "b.nii").read_bytes()[:42] + b"\xff\xff" + bytes(400)
    ),
    "NRRD has -1 dimensions": nrrd_header(NRRD.format(-1, "2 2", "raw")),
    "NRRD has 999999 dimensions": nrrd_header(NRRD.format(999999, "2 2", "raw")),
    "NRRD has 17 dimensions": nrrd_header(NRRD.format(17, "2 " * 17, "raw")),
    "NRRD has huge sizes": nrrd_header(NRRD.format(3, "100000 100000 100000", "raw")),
    "NRRD has sizes whose product wraps": nrrd_header(NRRD.format(3, "4294967296 4294967296 2", "raw")),
    "NRRD claims 8 GB, gzip": nrrd_header(NRRD.format(3, "2000 2000 1000", "gzip"), data=gzip.compress(bytes(9 * 10**6))),
    "NRRD has a data file %s": nrrd_header(NRRD.format(3, "10 10 10", "raw") + "\ndata file: %s%s%n%n"),
    "NRRD has a numbered list %n": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: %n%n.raw 0 1 1"),
    "NRRD has a list": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: LIST\n/etc/passwd"),
    "NRRD reads beyond its folder": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: /etc/passwd"),
    "NRRD of a long line": nrrd_header("type: short\ndimension: 3\nsizes: " + "2 " * 10**6),
    "NRRD has a long line that is no field": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\n" + "a" * 3000),
    "NRRD has a long field": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\nkinds: a:=" + "a" * 3000),
    "NRRD has a long data file": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndatafile: " + "a" * 10**5),
    "NRRD names two data files": nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: /etc/passwd\ndatafile: LOCAL"),
    "MHA names two data files": mha_header(MHA.format(3, "10 10 2", "/etc/passwd").replace("Element", "\tElement") + "\nElementDataFile = LOCAL"),
    "NRRD has a list, and a file of this name": lambda folder: (
        written(folder / "LIST", b""), nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: LIST\n/etc/passwd")(folder),
    )[1],
    "NHDR has no data": nrrd_header(NRRD.format(3, "10 10 2", "raw"), "CT_a.nhdr", b""),
    "NRRD names a FIFO": lambda folder: (
        fifo("v.raw")(folder),
        nrrd_header(NRRD.format(3, "10 10 2", "raw") + "\ndata file: v.raw", "CT_a.nhdr", b"")(folder),
    )[1],
    "MHA has -1 dimensions": mha_header(MHA.format(-1, "2 2", "LOCAL")),
    "MHA has 0 dimensions": mha_header(MHA.format(0, "2 2", "LOCAL")),
    "MHA has 100 dimensions": mha_header(MHA.format(100, "2 " * 100, "LOCAL")),
    "MHA has 11 dimensions": mha_header(MHA.format(11, "2 " * 11, "LOCAL")),
    "MHA has negative sizes": mha_header(MHA.format(3, "-10 10 -10", "LOCAL")),
    "MHA has huge sizes": mha_header(MHA.format(3, "100000 100000 100000", "LOCAL")),
    "MHA has a data file %s": mha_header(MHA.format(3, "10 10 10", "%s%s%s%n")),
    "MHA has a pattern": mha_header(MHA.format(3, "10 10 2", "%s%d%n.raw 0 1 1")),
    "MHA hides its data file behind a tab": mha_header(
        "NDims = 3\nDimSize = 10 10 2\nElementType = MET_SHORT\n\tElementDataFile = /etc/passwd\n"
    ),
    "MHA has a list": mha_header(MHA.format(3, "10 10 2", "LIST\n/etc/passwd\n/etc/passwd")),
    "MHA has a long value": mha_header("Comment = " + "a" * 10**6 + "\n" + MHA.format(3, "10 10 2", "LOCAL")),
    "MHA has many fields": mha_header("a = b\n" * 10**5 + MHA.format(3, "10 10 2", "LOCAL")),
    "MHA has a direction of 1e308": mha_header(
        "TransformMatrix = 1 0 0 0 1 0 1e308 0 1\n" + MHA.format(3, "10 10 2", "LOCAL")
    ),
    "MHA reads beyond its folder": mha_header(MHA.format(3, "10 10 2", "/etc/passwd"), "CT_a.mhd"),
    "MHA names itself as text": mha_header(MHA.format(3, "10 10 2", "CT_a.mha")),
    "MHA has 10 million channels": mha_header("ElementNumberOfChannels = 10000000\n" + MHA.format(3, "10 10 2", "LOCAL")),
    "MHA has -1 channels": mha_header("ElementNumberOfChannels = -1\n" + MHA.format(3, "10 10 2", "LOCAL")),
    "MHA, a name that is not UTF-8": lambda folder: itk(folder, "b.mha").rename(folder / os.fsdecode(b"CT_\xff.mha")),
    "PNG claims 2 GB": png_header(32768, 21845),
    "PNG claims 2 GB, 1 channel": png_header(65535, 32768, 8, 0),
    "PNG claims 0.9 Gpx of 16 bit": png_header(30000, 30000, 16, 2),
    "JPEG claims 65500 x 65500": jpeg_header(65500, 65500),
    "JPEG claims 30000 x 30000": jpeg_header(30000, 30000),
    "BMP claims 2 GB": lambda folder: written(
        folder / "US_a.bmp", (b := picture(folder, "b.bmp").read_bytes())[:18] + struct.pack("<ii", 30000, 30000) + b[26:]
    ),
    "npz, a bomb of 100 MB": npz_bomb((10, 10**7)),
    "PNG whose header was changed": lambda folder: written(
        path := picture(folder, "US_a.png"), path.read_bytes().replace(struct.pack(">I", 64), struct.pack(">I", 2**20), 1)
    ),
    "npz whose size and content were changed": lambda folder: npz_longer(folder),
    "npz claims 4 GB": npz_bomb((1, 100), (2**32,)),
    "npz claims 2^62": npz_bomb((1, 100), (2**62,)),
    "npz claims wide letters": npz_bomb((1, 100), (2,), "<U500000000"),
    "npz of 1,000 members": lambda folder: many_members(folder),
    "TIFF claims 8 GB": tiff_claim((90000, 90000)),
    "TIFF of 100,000 pages": tiff_claim((10, 10), 100_000),
    "TIFF of 100,000 pages, as a mask": lambda folder: (
        picture(folder, "US_a.png"), tiff_claim((64, 80), 100_000)(folder).rename(folder / "US_a_mask.tif"), folder / "US_a.png",
    )[2],
    "TIFF of 2000 pages of 4 MB": tiff_claim((2000, 2000), 2000),
    "TIFF of endless pages": lambda folder: written(
        folder / "CT_a.tif", b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 10, 8)
    ),
    "COCO runs that wrap": coco([2**31, 2**31, 5120]),
    "COCO runs that wrap at 2^32": coco([2**32 - 10, 10, 5120 - 2**32]),
    "COCO runs beyond the image": coco([0, 6000]),
    "COCO packed runs beyond": coco("o" * 11 + "0"),
    "COCO packed runs without end": coco("o" * 10000),
    "COCO negative runs": coco([-5, 5125]),
    "COCO runs of floats": coco([1e300, 5]),
    "COCO size of 2^40": coco([2**40], (2**20, 2**20)),
    "COCO polygon to 1e300": coco(segmentation=[[0, 0, 1e300, 0, 5, 5]]),
    "COCO polygon of NaN": coco(segmentation=[[0, 0, float("nan"), 0, 5, 5]]),
    "COCO object": coco(segmentation={"a": 1}),
    "COCO nested": lambda folder: (coco([5])(folder), written(folder / "a.json", b"[" * 10**6))[0],
    "Supervisely polygon to 2^32": lambda folder: supervisely(folder, [[5, 5], [40, 5], [40, 2**32]]),
    "DICOM slice at NaN": series("nan"),
    "DICOM alone at NaN": lambda folder: deflated_dicom(
        folder, syntax=ExplicitVRLittleEndian, ImagePositionPatient=[0, 0, float("nan")]
    ),
    "DICOM of an unknown kind of element": lambda folder: written(
        path := deflated_dicom(folder, syntax=ExplicitVRLittleEndian), path.read_bytes().replace(b"\x28\0\x10\0US", b"\x28\0\x10\0UJ")
    ),
    "DICOM slice at infinity": series("inf"),
    "DICOM claims 65535 x 65535": lambda folder: deflated_dicom(
        folder, syntax=ExplicitVRLittleEndian, Rows=65535, Columns=65535
    ),
    "DICOM of two billion frames": lambda folder: deflated_dicom(
        folder, syntax=ExplicitVRLittleEndian, NumberOfFrames="2000000000"
    ),
    "DICOM deflated, a bomb of 100 MB": lambda folder: dicom_bomb(folder),
    "boxes.csv of infinity": lambda folder: (
        written(folder / "boxes.csv", b"file,x0,y0,x1,y1\nUS_a.png,1,1,inf,9\n"), picture(folder, "US_a.png"),
    )[1],
    "boxes.csv names a file of another folder": lambda folder: (
        written(folder / "boxes.csv", b"file,x0,y0,x1,y1\nUS_a.png,1,1,9,9\n../US_a.png,1,1,9,9\n"), picture(folder, "US_a.png"),
    )[1],
    "boxes.csv is a link out of its folder": lambda folder: (
        (folder / "boxes.csv").symlink_to("/etc/passwd"), picture(folder, "US_a.png"),
    )[1],
    "boxes.csv is a FIFO": lambda folder: (fifo("boxes.csv")(folder), picture(folder, "US_a.png"))[1],
    **{f"{name} is a FIFO": fifo(name) for name in
       ("a.npz", "a.png", "a.tif", "a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.dcm", "a", "a.pkl", "a.pt")},
    **{f"{name} is a device": device(name) for name in ("a.npz", "a.png", "a.tif", "a.nii.gz", "a.mha", "a.dcm", "a.pt")},
    **{f"{name} is empty": partial(lambda name, folder: written(folder / name, b""), name) for name in
       ("a.npz", "a.png", "a.tif", "a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.dcm", "a.pkl", "a.pt")},
    "PKL of 8 GB": pickled(b"\x80\x04\x8e" + struct.pack("<Q", 8 * 2**30)),
    "PKL of 7 bytes": pickled(b"\x80\x04B\xff\xff\xff\x7f"),
    "PKL memo": pickled(b"\x80\x04Nr\xff\xff\xff\x7f."),
    "PKL memo 2": pickled(b"\x80\x04Nr\xff\xff\xff\x1f."),
    "PKL frame": pickled(b"\x80\x04\x95" + struct.pack("<Q", 2**62)),
    "PKL runs of 2^31": pickled([(1, 2**31, 1)]),
    "PKL number of a million digits": pickled(b"I" + b"9" * 10**6 + b"\n."),
}  # fmt: skip


def npz_longer(folder):
    """An array whose last value has changed, and whose member claims to be longer, so that np.load sees no checksum."""
    np.savez(folder / "2D_a.npz", imgs=PICTURE)
    content = bytearray((folder / "2D_a.npz").read_bytes())
    at = content.rindex(b"PK\1\2")
    size = struct.unpack("<I", content[at + 24 : at + 28])[0]
    content[at + 24 : at + 28] = struct.pack("<I", size + 64)
    content[at - 1] ^= 1
    return written(folder / "2D_a.npz", bytes(content))


def many_members(folder):
    with zipfile.ZipFile(folder / "2D_a.npz", "w") as file:
        for i in range(1000):
            file.writestr(f"{i}.npy", b"")
    return folder / "2D_a.npz"


def dicom_bomb(folder):
    path = deflated_dicom(folder)
    content = path.read_bytes()
    start = 144 + struct.unpack("<I", content[140:144])[0]
    plain = zlib.decompress(content[start:], -zlib.MAX_WBITS).removesuffix(VOXELS[..., 0].astype(np.uint16).tobytes())
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(plain[:-4] + struct.pack("<I", 10**8) + bytes(10**8)) + packer.flush()
    return written(path, content[:start] + packed)


# ---------------------------------------------------------------- reading


def read(path):
    """What a file gives: of a mask in PKL its labels, of a checkpoint its content, else a case's pixels."""
    if path.suffix == ".pkl":
        return load_mask(path, (8, 8))
    if path.suffix == ".pt":
        return read_checkpoint(path)
    case = read_case(path)
    if path.with_name("a.json").exists() or path.with_name("boxes.csv").exists():
        case = read_boxed(path)
    return case.image


def outcome(function, path):
    """What became of reading a file in a process of its own: "refused" and the sentence, "read" and bytes, "raised" and what."""
    here, there = os.pipe()
    if not (child := os.fork()):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = "read", np.asarray(function(path)).tobytes()
        except InputError as error:
            found = "refused", str(error)
        except BaseException as error:
            found = "raised", repr(error)
        mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        with os.fdopen(there, "wb") as pipe:
            pickle.dump((*found, mib), pipe)
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        content = pipe.read()
    status = os.waitpid(child, 0)[1]
    return pickle.loads(content) if content else ("killed", signal.Signals(os.WTERMSIG(status)).name, 0)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence_soon_and_with_little_memory(tmp_path, monkeypatch, name):
    path = BAD[name](tmp_path)
    for module in ("case", "npz", "scans") if "bomb" in name else ():
        monkeypatch.setattr(f"formats.{module}.MOST_BYTES", 2**26)
    kind, text, mib = outcome(read, path)
    assert kind == "refused", (kind, text)
    assert mib < MOST_MIB and len(text) <= MOST_LETTERS and text.isprintable() and text.startswith(str(tmp_path)[:50])


@pytest.mark.parametrize("name", GOOD)
def test_a_file_that_was_cut_or_changed_gives_its_own_pixels_or_a_sentence(tmp_path, name):
    path = GOOD[name](tmp_path)
    good, pixels, rng = path.read_bytes(), read(path).tobytes(), np.random.default_rng(0)
    spoilt = [good[: int(end)] for end in np.linspace(0, len(good) - 1, 20)]
    for at in rng.integers(0, len(good), 40) if name in WITH_CHECKSUM else ():
        spoilt.append(good[:at] + bytes([good[at] ^ 1 << rng.integers(8)]) + good[at + 1 :])
    refused = 0
    for content in spoilt:
        kind, what, _ = outcome(read, written(path, content))
        assert kind == "refused" and len(what) <= MOST_LETTERS or kind == "read" and what == pixels, (kind, what[:300])
        refused += kind == "refused"
    assert refused > 10


# ---------------------------------------------------------------- checkpoints


def net(dtype=torch.float32, value=0.5):
    return {"a.weight": torch.full((64, 64), value).to(dtype), "n": torch.tensor(3)}


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(64, 64, bias=False)
        self.register_buffer("n", torch.tensor(0))


@pytest.mark.parametrize(
    "state, words",
    [
        (net(), ""), (net(torch.float16), ""), (net(value=float("nan")), "NaN"), (net(value=float("inf")), "NaN"),
        (net(torch.int32, 2), "another kind"), (net(torch.complex64), "another kind"), (net(torch.bool), "another kind"),
        (net() | {"n": torch.tensor(3.5)}, "another kind"), (net() | {"n": 3}, "no plain tensors"),
    ],
)  # fmt: skip
def test_weights_are_finite_floats_where_the_network_has_floats(tmp_path, state, words):
    torch.save({"model": state}, tmp_path / "a.pt")
    if not words:
        load_weights(tmp_path / "a.pt", Small())
        return
    with pytest.raises(InputError, match=words):
        load_weights(tmp_path / "a.pt", Small())


def test_one_bit_of_a_checkpoint_that_changed_is_seen(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": net()})
    good, rng = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(0)
    at = good.index(net()["a.weight"].numpy().tobytes())
    for place in (at, *rng.integers(at, at + 4 * 64 * 64, 20)):
        (tmp_path / "a.pt").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_with_nan_is_not_written_and_the_one_before_it_stays(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": net()})
    for value, file in ((float("nan"), "a.pt"), (float("inf"), "a.pt"), (float("nan"), "a.safetensors")):
        with pytest.raises(InputError, match="not written, 1 tensors hold NaN or infinity"):
            save_checkpoint(tmp_path / file, {"model": net(value=value)})
    assert read_checkpoint(tmp_path / "a.pt")["model"]["a.weight"][0, 0] == 0.5
    save_checkpoint(tmp_path / "b.pt", {"model": net(value=1e6)})
    with pytest.raises(InputError, match="not written"):  # beyond float16
        export_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt")


def test_what_was_changed_in_a_checkpoint_is_seen(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": net(), "step": 3, "log": [{"loss": 0.5}]})
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(dict(reversed(stored.items())), tmp_path / "b.pt")
    assert read_checkpoint(tmp_path / "b.pt")["log"] == [{"loss": 0.5}]
    changed = ({"step": 4}, {"log": []}, {"model": net(value=0.25)}, {"model": net(torch.float16)}, {"more": 1})
    for other in changed:
        torch.save(stored | other, tmp_path / "b.pt")
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(tmp_path / "b.pt")
    wide = torch.zeros(1).expand(10**12)
    torch.save(stored | {"wide": wide}, tmp_path / "b.pt")
    assert outcome(read_checkpoint, tmp_path / "b.pt")[0] == "refused"


def test_weights_go_to_safetensors_and_back(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    state = {f"a.{kind}": torch.arange(-3, 9).reshape(3, 4).to(kind) for kind in kinds}
    state |= {"n": torch.tensor(3), "none": torch.empty(0, 5), "yes": torch.tensor([True, False])}
    state["turned"] = torch.arange(6.0).reshape(2, 3).T
    says = {"architecture": "proposed", "preset": "paper"}
    save_checkpoint(tmp_path / "a.safetensors", says | {"model": state, "step": 3})
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert found == says | {"model": found["model"]} and found["model"].keys() == state.keys()
    assert all(torch.equal(found["model"][k], v) and found["model"][k].dtype == v.dtype for k, v in state.items())
    # as the format's own description has it
    content = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = header["a.torch.float16"]
    start, end = about["data_offsets"]
    assert (about["dtype"], about["shape"], end - start) == ("F16", [3, 4], 24) and size % 8 == 0
    assert header["__metadata__"].keys() == {*says, "crc32"}
    assert np.frombuffer(content[8 + size + start :][:24], "<f2").tolist() == [*range(-3, 9)]


def safetensors_file(folder, header, data=bytes(16), size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    return written(folder / "a.safetensors", size.to_bytes(8, "little") + text + data)


def tensor(**changed):
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changed}


BAD_SAFETENSORS = {
    "empty": (b"", b"", 0), "a header of 2^60 bytes": (tensor(), bytes(16), 2**60), "no JSON": (b"{" * 100,),
    "nested": (b"[" * 10**5,), "a list": ([],), "a shape of 2^40": (tensor(shape=[2**20, 2**20]),),
    "a shape that wraps": (tensor(shape=[2**32, 2**32]),), "negative": (tensor(shape=[-2, -2]),),
    "fractions": (tensor(shape=[2.0, 2]),), "letters": (tensor(shape=["2", "2"]),), "unknown": (tensor(dtype="F8_E4M3"),),
    "a hole": (tensor(data_offsets=[4, 20]), bytes(20)), "too long": (tensor(), bytes(17)), "too short": (tensor(), bytes(15)),
    "overlapping": (tensor() | {"b": tensor()["a"]},), "nothing said": ({"a": {}},), "backwards": (tensor(data_offsets=[16, 0]),),
    "metadata": (tensor() | {"__metadata__": 5},), "checksum": (tensor() | {"__metadata__": {"crc32": "0"}},),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_a_bad_safetensors_file_is_refused(tmp_path, name):
    kind, told, mib = outcome(read_checkpoint, safetensors_file(tmp_path, *BAD_SAFETENSORS[name]))
    assert (kind, len(told) <= MOST_LETTERS, mib < MOST_MIB) == ("refused", True, True), (told, mib)


def test_a_safetensors_file_that_was_cut_or_changed_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"model": net(), "preset": "fixed"})
    good, rng = (tmp_path / "a.safetensors").read_bytes(), np.random.default_rng(0)
    for end in rng.integers(0, len(good), 20):
        written(tmp_path / "a.safetensors", good[:end])
        assert outcome(read_checkpoint, tmp_path / "a.safetensors")[0] == "refused"
    # behind the header, whose spaces say nothing
    for at in rng.integers(8 + int.from_bytes(good[:8], "little"), len(good), 40):
        written(tmp_path / "a.safetensors", good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        assert outcome(read_checkpoint, tmp_path / "a.safetensors")[0] == "refused"


def test_a_checkpoint_is_exported_for_other_programs(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": net(), "preset": "paper", "architecture": "proposed", "optimiser": {}})
    assert command("-m", "formats.checkpoints", tmp_path / "a.pt", tmp_path / "b.safetensors").returncode == 0
    stored = read_checkpoint(tmp_path / "b.safetensors")
    assert (stored["preset"], stored["model"]["a.weight"].dtype) == ("paper", torch.float16)
    done = command("-m", "formats.checkpoints", tmp_path / "none.pt")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- one bad case beside good ones, as commands


def command(*arguments, **settings):
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=120, env=os.environ | settings)


def spoil(folder, names):
    """Files that are bad in several ways under these names: a pipe, a folder, a bomb, an image of objects, a dead link."""
    os.mkfifo(folder / names[0])
    (folder / names[1]).mkdir()
    (folder / names[2]).write_bytes(npz_bomb((1, 100), (2**62,))(folder).read_bytes())
    (folder / "2D_a.npz").unlink()
    np.savez(folder / names[3], imgs=np.array([{}], object), gts=np.array([{}], object))
    (folder / names[4]).symlink_to("nowhere")


NAMES = ["2DBox_US_a.npz", "2DBox_US_b.npz", "2DBox_US_c.npz", "2DBox_US_d.npz", "2DBox_US_e.npz"]


def test_a_bad_case_costs_no_good_one_in_any_step(tmp_path):
    for folder in ("train", "imgs", "gts"):
        (tmp_path / folder).mkdir()
        spoil(tmp_path / folder, NAMES)
    name = os.fsdecode(b"2DBox_US_\xff\x1b[2J.npz")  # no UTF-8, and what clears a terminal
    case = tiny_case()
    save_npz(tmp_path / "train" / name, imgs=case.image, gts=case.labels)
    save_npz(tmp_path / "imgs" / name, imgs=case.image, boxes=[[10, 8, 45, 40]])
    save_npz(tmp_path / "gts" / name, gts=case.labels, boxes=[[10, 8, 45, 40]])
    steps = (
        ("01_preprocess.py", "-i", tmp_path / "train", "-o", tmp_path / "cache", "--jobs", "1"),
        ("04_infer.py", "-i", tmp_path / "imgs", "-o", tmp_path / "segs", "--model", "baseline"),
        ("05_evaluate.py", "-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "eval", "--jobs", "1"),
    )
    for step in steps:
        done = command(*step)
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        assert done.returncode == 1 and "Traceback" not in "".join(lines), lines
        assert all(len(line) < MOST_LETTERS + 40 and line.isprintable() for line in lines), lines
        assert all(any(bad in line for line in lines) for bad in NAMES), lines
    assert len(list((tmp_path / "cache" / "imgs").glob("*.png"))) == 1 and (tmp_path / "cache" / "index.csv").is_file()
    assert (tmp_path / "segs" / name).is_file() and (tmp_path / "segs" / "objects.csv").is_file()
    assert "2DBox_US_" in (tmp_path / "eval" / "cases.csv").read_text()


def test_what_was_raised_is_shown_where_it_is_asked_for(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    step = ("04_infer.py", "-i", tmp_path / "a.png", "--box", "1", "1", "9", "9", "--model", "baseline")
    assert b"Traceback" not in command(*step).stderr
    assert b"UnidentifiedImageError" in command(*step, GRAYS_DEBUG="yes").stderr


@pytest.mark.parametrize("share", ["inf", "nan", "-1", "1e999"])
def test_a_looseness_is_a_number(share):
    done = command("05_evaluate.py", "-s", "a", "-g", "b", "--looseness", share)
    assert done.returncode == 2 and b"--looseness" in done.stderr.splitlines()[-1]
