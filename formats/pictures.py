"""Pictures: PNG, JPG and BMP by OpenCV, TIFF by tifffile; and mask pictures, whose palettes Pillow reads."""

import io
import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from formats import MAX_LABEL, MOST_BYTES, InputError
from formats.case import Case, check_claim, check_contrast, paint, told_in_a_sentence

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MOST_PIXELS = MOST_BYTES // 3  # three colours
MOST_PACKED = 8 * 1032  # pixels of one bit that a byte of zlib, the densest code, unpacks to at most
MOST_PAGES = 10_000  # of a TIFF
MAX_COLOURS = 256  # of a colour mask; a photograph has thousands
WHITE_BORDER = 0.75  # a mask with this share of its border white may have its background as its object
NEAR = 16  # grey levels: classes of a mask with soft edges lie farther apart
ORIENTATION = 274  # of a TIFF and of EXIF: how to turn a picture, 1 (as it is) to 8


def read_picture(path: Path, window: tuple[float, float] | None = None, modality: str = "") -> Case:
    """A picture as a case; the pages of a TIFF as the slices of a volume. InputError if it can't be read.

    window, modality: see `intensity.gray_case`.
    """
    pixels, is_3d = _pixels(path)
    if pixels.size and pixels.dtype == np.uint8:  # as most are: a window changes nothing, and needs no import
        check_contrast(pixels, path)
        return Case(path.stem, pixels, None, None, None, is_3d, modality=modality)
    from formats.intensity import gray_case

    return gray_case(path, pixels, window, is_3d, modality=modality)


def read_image(path: Path | str) -> np.ndarray:
    """A picture file of one page -> (H, W) or (H, W, 3) RGB uint8, more bits by percentiles. InputError if it can't be read."""
    path = Path(path)
    pixels, is_3d = _pixels(path)
    if is_3d:
        raise InputError(f"{path}: holds several pages; save the one to use as an image of its own")
    return pixels if pixels.dtype == np.uint8 else read_picture(path).image


def read_mask(path: Path) -> np.ndarray:
    """A mask picture -> (H, W), or (D, H, W) if it has pages, integers; 0 is background.

    Each gray value, number of a palette, or colour is an object, colours by red, green, blue; background is black, or
    where there is none the most frequent colour. InputError also for a photograph, or if background and object may
    have changed places.
    """
    values, is_colour = _mask_values(path)
    rows = values.reshape(-1, values.shape[-1])  # pages below each other: one numbering for all
    return _without_soft_edges(rows, path, is_colour).reshape(values.shape)


def read_masks(paths: Sequence[Path]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Mask pictures of one image, in each one object: what lies above half of the largest value.

    -> (label map uint16, names by the files, boxes (N, 4 or 6), None if all are empty)
    """
    masks, names, shape = [], [], None
    for path in paths:
        values = _mask_values(path)[0]
        shape = shape or values.shape
        if values.shape != shape:
            raise InputError(f"{path}: its size is {values.shape}, but {paths[0].name} has {shape}; resize it")
        if values.any():
            masks.append(values > values.max() / 2)
            names.append(path.stem)
    if not masks:
        return np.zeros(shape, np.uint16), (), None
    labels, boxes = paint(masks, names, paths[0].parent)
    return labels, tuple(names), boxes


def as_shown(labels: np.ndarray, labels_path: Path, path: Path) -> np.ndarray:
    """Labels (H, W) of a photo, turned as the photo is shown. InputError if it cannot be known how they lie.

    A mask without the photo's mark (EXIF orientation) was drawn on the photo as stored, or as shown; where the two
    differ in shape, its shape says which.
    """
    mark, stored = _mark(path)
    own = 1 if labels_path.suffix == ".json" else _mark(labels_path)[0]
    if mark == own:
        return labels
    if own == 1 and mark > 4 and stored[0] != stored[1]:
        return _turned(labels, mark) if labels.shape == stored else labels
    marks = f"{path.name} is marked to be turned (EXIF orientation {mark}, this file: {own})"
    advice = "nothing says on which view the objects were drawn; save both without the mark, turned alike"
    raise InputError(f"{labels_path}: {marks}, and {advice}")


# ---------------------------------------------------------------- pixels


def _pixels(path: Path, raw: bool = False) -> tuple[np.ndarray, bool]:
    """(H, W), (H, W, 3) RGB or, if True comes with it, (D, H, W): a picture as viewers show it.

    raw: numbers as stored, for masks.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if path.suffix.lower() in (".tif", ".tiff"):
        pixels, is_3d = _tiff(path, raw)
    else:
        # all channels and bits, and turned as the camera says, as viewers show it; alpha is dropped
        what = f"not an image that OpenCV can read, or one of more than {MOST_PIXELS:,} pixels"
        with told_in_a_sentence(path, what, "give a PNG, JPG, TIFF or BMP file"):
            # cv2.imread cannot open non-ASCII paths on Windows
            pixels, is_3d = _decoded(path.read_bytes()), False
        pixels = np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels  # OpenCV reads BGR
    # 16 bits that hold 8 stay as they are
    small = pixels.dtype == np.uint16 and pixels.max() <= 255
    return pixels.astype(np.uint8) if small else pixels, is_3d


def _opened(file):
    """What Pillow says of a picture, before its pixels are decoded."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit is MOST_PIXELS
    return Image.open(file)


def _decoded(content: bytes) -> np.ndarray:
    """The pixels of a PNG, JPG or BMP as OpenCV decodes them, (H, W) or (H, W, 3) BGR. ValueError for a damaged one."""
    with _opened(io.BytesIO(content)) as header:
        pixels = math.prod(header.size)
        header.verify()  # of PNG the checksums: OpenCV reads some damaged ones without end
    if pixels > min(MOST_PIXELS, len(content) * MOST_PACKED):
        raise ValueError(f"it claims {header.size[0]} x {header.size[1]} pixels")
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if found is None:
        raise ValueError("it decodes nothing")
    return found


class _Raised(logging.Handler):
    """tifffile only logs that pages are missing or damaged, and gives fewer or black ones."""

    def emit(self, record: logging.LogRecord) -> None:
        # notes that it can't read, and counts that it puts right, are no damage
        if not re.search("TiffTag|incorrect", record.getMessage()):
            raise ValueError(record.getMessage())


RAISED = _Raised(logging.ERROR)


def _tiff(path: Path, raw: bool) -> tuple[np.ndarray, bool]:
    """What `_pixels` gives of a TIFF. Its axes are those that tifffile finds: Y, X, S (colours), Z, C, T, I (pages), ..."""
    import tifffile  # only here: it takes a tenth of a second to load

    logging.getLogger("tifffile").setLevel(logging.ERROR)
    logging.getLogger("tifffile").addHandler(RAISED)
    can_not = told_in_a_sentence(path, "tifffile can't read it", "copy it again, or save it anew as a plain TIFF")
    with can_not, tifffile.TiffFile(path, _multifile=False) as file:
        if not 0 < len(file.pages) <= MOST_PAGES:
            raise ValueError(f"it has {len(file.pages)} pages, not 1 to {MOST_PAGES}")
        series = [one for one in file.series if not one.keyframe.is_reduced]  # those are previews
        page, kind, axes = series[0].keyframe, series[0].keyframe.photometric.name, series[0].axes
        if len({(one.shape, one.axes, one.dtype, one.keyframe.photometric) for one in series}) > 1:
            shapes = ", ".join(str(one.shape) for one in series[:3])
            raise InputError(f"{path}: holds pictures of several sizes or kinds ({shapes}); save the one to use alone")
        check_claim(path, (len(series), *series[0].shape), series[0].dtype, file.filehandle.size * MOST_PACKED)
        if any(one is None for some in series for one in some.pages):
            raise ValueError("pages are missing")
        if kind not in ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE") and (kind, page.compression) != ("YCBCR", 7):
            raise InputError(f"{path}: its colours are {kind}; save it as RGB or gray")
        pixels = series[0].asarray()
        if len(series) > 1:
            pixels, axes = np.stack([pixels, *(one.asarray() for one in series[1:])]), f"I{axes}"
        pixels, axes = _as_viewers_show(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), axes, page, raw)
        pixels, is_3d = _one_image(path, pixels, axes)
        mark = page.tags.valueof(ORIENTATION, 1)
    return np.stack([_turned(plane, mark) for plane in pixels]) if is_3d else _turned(pixels, mark), is_3d


def _as_viewers_show(pixels: np.ndarray, axes: str, page, raw: bool) -> tuple[np.ndarray, str]:
    """Pixels and axes of a TIFF: white is high, palettes are colours unless `raw`; S is the last axis, three colours."""
    kind, bits = page.photometric.name, page.bitspersample
    if kind == "MINISWHITE" and not (raw and _edge(pixels)[0] == 0):  # a mask's 0 is its background, however shown
        pixels = (
            (1 << bits) - 1 - pixels if pixels.dtype.kind == "u" else -pixels if pixels.dtype.kind == "f" else ~pixels
        )
    if not raw and kind == "PALETTE":
        colours = page.colormap >> (8 if page.colormap.max() > 255 else 0)
        pixels, axes = np.moveaxis(colours.astype(np.uint8)[:, pixels], 0, -1), f"{axes}S"
    elif not raw and bits < 8:
        pixels = pixels.astype(np.uint8) * (255 // ((1 << bits) - 1))
    if "S" in axes:
        pixels, axes = np.moveaxis(pixels, axes.index("S"), -1), axes.replace("S", "") + "S"
        if kind in ("RGB", "YCBCR", "PALETTE") and pixels.shape[-1] <= 4:
            pixels = pixels[..., :3]  # alpha is dropped
        elif pixels.shape[-1] - len(page.extrasamples) == 1 and all(page.extrasamples):
            pixels, axes = pixels[..., 0], axes[:-1]
        else:  # an extra sample of type 0 is no alpha, but a channel that nothing names
            axes = axes.replace("C", "Q").replace("S", "C")
    return pixels, axes


def _one_image(path: Path, pixels: np.ndarray, axes: str) -> tuple[np.ndarray, bool]:
    """One picture, or one volume (True), of pixels with these axes. InputError if they are several."""
    more = [i for i, axis in enumerate(axes) if axis not in "YXS" and pixels.shape[i] > 1]
    if len(more) > 1 or more and (axes[more[0]] not in "ZIQ" or more[0] > axes.index("Y")):
        found = ", ".join(f"{axis} {size}" for axis, size in zip(axes, pixels.shape, strict=True))
        raise InputError(f"{path}: has the axes {found}; save one channel of one time as a gray picture or volume")
    is_3d, is_colour = bool(more), axes.endswith("S")
    pixels = pixels.squeeze(tuple(i for i, axis in enumerate(axes) if axis not in "YXS" and i not in more))
    if is_3d and is_colour and not (pixels == pixels[..., :1]).all():
        raise InputError(f"{path}: holds {len(pixels)} colour pages; save the one to use as a picture of its own")
    return pixels[..., 0] if is_3d and is_colour else pixels, is_3d


def _turned(page: np.ndarray, mark: int) -> np.ndarray:
    """A page (H, W) or (H, W, 3) as its mark says: EXIF orientation, 1 to 8, 1 as it is."""
    page = page.swapaxes(0, 1) if mark in (5, 6, 7, 8) else page
    page = page[:, ::-1] if mark in (2, 3, 6, 7) else page
    return np.ascontiguousarray(page[::-1] if mark in (3, 4, 7, 8) else page)


def _mark(path: Path) -> tuple[int, tuple[int, int]]:
    """How a picture is to be turned, EXIF orientation 1 to 8, and its size (H, W) as stored."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            import tifffile

            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                mark, size = page.tags.valueof(ORIENTATION, 1), (page.imagelength, page.imagewidth)
        else:
            with _opened(path) as picture:
                mark, size = picture.getexif().get(ORIENTATION, 1), picture.size[::-1]
    except (OSError, ValueError, SyntaxError, IndexError):  # it was read, so only its marks are damaged
        return 1, (0, 0)
    return mark if mark in range(1, 9) else 1, size


# ---------------------------------------------------------------- masks to objects


def _mask_values(path: Path) -> tuple[np.ndarray, bool]:
    """Numbers of a mask (H, W) or (D, H, W), 0 background; True: they number colours. InputError if that is not sure."""
    values, is_3d = _palette_numbers(path), False
    if values is None:
        values, is_3d = _pixels(path, raw=True)
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)) and np.abs(values).max() < 2**31:
        values = values.astype(np.int64)
    if values.dtype == bool:
        values = values * np.uint8(255)
    if values.dtype.kind not in "ui":
        raise InputError(f"{path}: holds {values.dtype} values; label numbers are whole: save it as 8 or 16 bit")
    has_channels = values.ndim == 3 and not is_3d
    is_colour = has_channels and not (values == values[..., :1]).all()
    codes = values[..., 0] if has_channels else values
    if is_colour:
        codes = values.astype(np.uint64) @ np.array([1 << 32, 1 << 16, 1], np.uint64)
    edge, share = _edge(codes)
    white = 255 if values.dtype == np.uint8 else np.iinfo(values.dtype).max
    is_white = edge == white * ((1 << 32) + (1 << 16) + 1) and not codes.all() if is_colour else edge >= 0.98 * white
    if share >= WHITE_BORDER and is_white:
        advice = "save the background as 0, and if a white object does fill the border, save it as 1"
        raise InputError(f"{path}: its border is white, so its background may be the object; {advice}")
    return _numbers_of_colours(codes, path) if is_colour else codes, is_colour


def _edge(values: np.ndarray) -> tuple[int, float]:
    """The most frequent number on the border of (..., H, W), and its share."""
    sides = [values[..., 0, :], values[..., -1, :], values[..., 0], values[..., -1]]
    found, counts = np.unique(np.concatenate([side.ravel() for side in sides]), return_counts=True)
    return found[counts.argmax()], counts.max() / counts.sum()


def _palette_numbers(path: Path) -> np.ndarray | None:
    """The numbers of an indexed picture, (H, W) uint8; None if it has no palette. OpenCV gives only their colours.

    Number 0 is background. The colours are given instead, (H, W, 3), where number 0 is not black and black lies
    round it, or where edges are soft: programs that choose a palette number it in any order.
    """
    if not path.is_file() or path.suffix.lower() in (".jpg", ".jpeg"):
        return None
    try:
        with _opened(path) as picture:
            mark = picture.getexif().get(ORIENTATION, 1)
            # Pillow turns some TIFFs twice
            if picture.mode != "P" or math.prod(picture.size) > MOST_PIXELS or picture.format == "TIFF" and mark != 1:
                return None
            with suppress(EOFError):  # to count the pages would take the square of their number
                picture.seek(1)
                return None
            numbers, colours = np.array(picture), np.reshape(picture.getpalette("RGB"), (-1, 3)).astype(np.uint8)
    except (OSError, SyntaxError, ValueError):
        return None  # the other reader says what is wrong
    numbers, colours = _turned(numbers, mark), np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    (edge, share), is_used = _edge(numbers), np.bincount(numbers.ravel(), minlength=256) > 0
    dark, is_white = colours.max(axis=1) < 50, colours[edge].min() >= 250
    ranks = np.unique(colours, axis=0, return_inverse=True)[1].ravel()  # by red, green, blue
    is_gray = (colours[is_used] == colours[is_used][:, :1]).all()
    values = (colours[:, 0] if is_gray else ranks.astype(np.uint8))[numbers]
    if is_used.sum() > 2 and _classes(values, False, not is_gray) is not None:
        return colours[numbers]
    if edge == 0 or not is_used[0] or dark[0] and not (is_white and share >= WHITE_BORDER):
        return numbers
    if dark[edge]:
        return colours[numbers]
    told = f"{colours[0].tolist()}, is background, but number {edge}, {colours[edge].tolist()}, lies round it"
    raise InputError(f"{path}: number 0 of its palette, {told}; save it with the background as number 0, or black")


def _numbers_of_colours(codes: np.ndarray, path: Path) -> np.ndarray:
    """Colours of a mask, each as one number (H, W) -> label numbers (H, W), in the order of red, green, blue."""
    colours, labels, counts = np.unique(codes, return_inverse=True, return_counts=True)
    if len(colours) > MAX_COLOURS or path.suffix.lower() in (".jpg", ".jpeg"):
        advice = "give label numbers in one gray channel, or one colour for each object"
        raise InputError(f"{path}: is a colour picture of {len(colours)} colours, not a mask; {advice}")
    background = 0 if colours[0] == 0 else int(np.argmax(counts))
    numbers = np.insert(np.arange(1, len(colours)), background, 0)
    return numbers[labels].reshape(codes.shape).astype(np.uint16)


def _without_soft_edges(values: np.ndarray, path: Path, is_colour: bool) -> np.ndarray:
    """Numbers of a mask (H, W) as they are; but if its edges are soft, its classes (H, W), 1, 2, ... by brightness.

    Edges are soft if three or more numbers between two classes lie on slopes between them. A class is
    a number that fills places of 3 x 3 pixels. JPEG makes all edges soft.
    """
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    if not values.any() or len(np.unique(values)) < 3 and not is_jpeg:
        return values
    # A soft mask that was enlarged without interpolation has edges of blocks: they are looked at as pixels
    steps = (np.flatnonzero((np.diff(values, axis=axis) != 0).any(axis=1 - axis)) + 1 for axis in (0, 1))
    blocks = math.gcd(*values.shape, *np.concatenate([*steps]).tolist())
    if 1 < blocks <= 16 and isinstance(found := _classes(values[::blocks, ::blocks], is_jpeg, is_colour), np.ndarray):
        return found.repeat(blocks, 0).repeat(blocks, 1)
    found = _classes(values, is_jpeg, is_colour)
    if isinstance(found, str):
        raise InputError(f"{path}: {found}; save label numbers 1, 2, ..., without smoothing and not as JPEG")
    return values if found is None else found


def _classes(values: np.ndarray, is_jpeg: bool, is_colour: bool) -> np.ndarray | str | None:
    """What `_without_soft_edges` gives of soft edges; None if there are none; a text if classes and edges can't be told."""
    levels, ranks = np.unique(values, return_inverse=True)
    if len(levels) > MAX_LABEL:
        return None  # too many for any label map, which will be told
    levels, ranks = levels.astype(float), ranks.reshape(values.shape).astype(np.uint16)
    flat = cv2.erode(ranks, np.ones((3, 3), np.uint8)) == cv2.dilate(ranks, np.ones((3, 3), np.uint8))
    pixels, inner = (np.bincount(some.ravel(), minlength=len(levels)) for some in (ranks, ranks[flat]))
    is_class = inner >= pixels / 4
    is_class[-1] |= inner[-1] > 0 or not is_class[1:].any()
    ids, near = np.flatnonzero(is_class), 0 if is_colour else NEAR * max(1, levels[-1] / 255)
    # A slope has lower and higher numbers within 2 pixels; where classes are far apart, noise lies close to one
    rest = ~is_class[ranks]
    low, high = (change(ranks, np.ones((5, 5), np.uint8)) for change in (cv2.erode, cv2.dilate))
    far = not is_colour and levels[-1] >= 100 and np.diff(levels[ids]).min(initial=np.inf) > near
    noise = np.abs(levels[:, None] - levels[ids]).min(axis=1) < 4 if far else np.zeros(len(levels), bool)
    slope = np.count_nonzero(rest & ((low < ranks) & (ranks < high) | noise[ranks])) / max(1, np.count_nonzero(rest))
    blurred = f"holds {len(levels)} values that run into each other, no label numbers and no mask"
    if not is_jpeg and len(levels) > NEAR and flat.mean() < 0.1:
        return blurred
    # Three numbers or more between two classes; two are enough between black and white alone
    steps = 3 if len(ids) == 2 and levels[-1] in (255, 65_535) else 4
    ramps = (np.diff(ids) >= steps) & (np.diff(levels[ids]) > near)
    if not is_jpeg and (slope < 0.7 or not ramps.any() and not (noise | is_class).all()):
        if slope <= 0.95 or not far:
            return None
        lone = ", ".join(f"{level:g}" for level in levels[~is_class])
        return f"has values, {lone}, at the edges of others alone: soft edges, or objects numbered so"
    core = np.count_nonzero(~rest & (ranks > 0))
    if flat.mean() < 0.3 or flat.mean() < 0.9 and slope < 0.9 and np.count_nonzero(rest) > core:
        return blurred

    # Values near each other are one class, as JPEG gives it; the most frequent one stands for it
    groups = np.split(ids, np.flatnonzero(np.diff(levels[ids]) > near) + 1)
    centres = [levels[group[pixels[group].argmax()]] for group in groups]
    first = 0 if centres[0] <= near else 1  # the number of the darkest class: background, if it is black
    if not is_jpeg and any(np.sort(pixels[group])[:-1].max(initial=0) > 0.05 * pixels[group].sum() for group in groups):
        return f"has soft edges, and classes that lie near each other, {levels[ids].tolist()}"
    if len(groups) + first < 2 or not is_colour and levels[-1] > centres[-1] * 1.4 + 2 * near:
        return f"holds values from {levels[0]:g} to {levels[-1]:g}, and objects too faint or too small to stand out"
    if len(groups) == 2 and first == 0 and not is_colour:
        return (values > (centres[0] + centres[1]) / 2).astype(np.uint16)

    # Several classes: the slope of a bright one passes the values of a darker one, so the nearest class counts
    number = np.full(len(levels), -1)
    for i, group in enumerate(groups):
        number[group] = first + i
    by_value = number[ranks]
    pairs = ((by_value[1:], by_value[:-1]), (by_value[:, 1:], by_value[:, :-1]))
    hard = sum(np.count_nonzero((one != other) & (np.minimum(one, other) >= 0)) for one, other in pairs)
    if not is_jpeg and hard > np.count_nonzero(rest) / 4:
        return "has soft edges and hard ones, so thin objects may be taken for edges"
    seeds = flat & (by_value >= 0)
    away = (~seeds).astype(np.uint8)
    nearest = cv2.distanceTransformWithLabels(away, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    class_of = np.zeros(nearest.max() + 1, np.uint16)
    class_of[nearest[seeds]] = by_value[seeds]
    labels = class_of[nearest]
    if np.count_nonzero((by_value > 0) & (by_value != labels)) > 0.05 * np.count_nonzero(labels):
        return "has soft edges, several classes, and parts too thin to say which"
    return labels
