"""Pictures: PNG, JPG, TIFF and BMP files of 8 or 16 bits, and the mask pictures that belong to them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from formats import InputError
from formats.case import Case, check_contrast

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MAX_COLOURS = 256  # of a colour mask; a photograph has thousands


def read_picture(path: Path, window: tuple[float, float] | None = None, modality: str = "") -> Case:
    """A picture as a case; the pages of a TIFF as the slices of a volume. InputError if it can't be read."""
    pages = _pages(path)
    is_3d, pixels = len(pages) > 1, pages[0]
    if is_3d:
        if not all(_is_gray(page) for page in pages):
            raise InputError(f"{path}: holds {len(pages)} colour pages; save the one to use as a picture of its own")
        pixels = np.stack([page if page.ndim == 2 else page[..., 0] for page in pages])
    if pixels.dtype == np.uint8:  # as most are: a window changes nothing, and needs no import
        check_contrast(pixels, path)
        return Case(path.stem, pixels, None, None, None, is_3d)
    from formats.intensity import gray_case

    return gray_case(path, pixels, window, is_3d, modality=modality)


def read_image(path: Path | str) -> np.ndarray:
    """Read a PNG, JPG, BMP or TIFF file of one page -> (H, W) or (H, W, 3) RGB uint8. InputError if it can't be read.

    More than 8 bits become 8 by the percentiles of intensity.py.
    """
    path = Path(path)
    pages = _pages(path)
    if len(pages) > 1:
        raise InputError(f"{path}: holds several pages; save the one to use as an image of its own")
    return pages[0] if pages[0].dtype == np.uint8 else read_picture(path).image


def read_mask(path: Path) -> np.ndarray:
    """Read a mask picture -> (H, W), or (D, H, W) if it has pages, integers; 0 is background.

    Gray: every value is an object.   Indexed: every number of the palette is one.
    Colours: each is an object, in the order of red, green, blue; black is background, or where there
    is none the most frequent colour.   JPEG: its values smear, so it is cut at 127 into background
    and one object; so is a mask of 0 and 255 with soft edges, as resizing makes them.
    InputError if the file can't be read or is a photograph.
    """
    indices = _palette_indices(path)
    if indices is not None:
        return indices
    masks = [_labels_of_colours(page, path) if page.ndim == 3 else page for page in _pages(path)]
    labels = masks[0] if len(masks) == 1 else np.stack(masks)
    if labels.dtype.kind not in "ui":
        raise InputError(f"{path}: holds {labels.dtype} values; label numbers are whole: save it as 8 or 16 bit")
    return (labels > 127).astype(np.uint8) if path.suffix.lower() in (".jpg", ".jpeg") or _is_soft(labels) else labels


def read_masks(paths: Sequence[Path]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Mask pictures of one image, one object each -> (label map uint16, the object's name by its file).

    An object is what lies above half of its picture's largest value. A later object covers an earlier one.
    """
    labels, names = None, []
    for path in paths:
        mask = read_mask(path)
        if labels is None:
            labels = np.zeros(mask.shape, np.uint16)
        if mask.shape != labels.shape:
            raise InputError(f"{path}: its size is {mask.shape}, but {paths[0].name} has {labels.shape}; resize it")
        if mask.any():
            names.append(path.stem)
            labels[mask > mask.max() / 2] = len(names)
    return labels, tuple(names)


def _pages(path: Path) -> list[np.ndarray]:
    """Pixels of a picture's pages, each (H, W) or (H, W, 3) RGB. All but TIFF have one page."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    # all channels and bits, and turned as the camera says, as viewers show it; alpha is dropped
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
    try:
        content = np.fromfile(path, dtype=np.uint8)  # cv2.imread cannot open non-ASCII paths on Windows
        if path.suffix.lower() in (".tif", ".tiff"):
            pages = cv2.imdecodemulti(content, flags)[1]
        else:
            pages = [cv2.imdecode(content, flags)]
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    except cv2.error:  # an empty file, or a size beyond OpenCV's limit, true or from a damaged header
        pages = []
    if not pages or any(page is None for page in pages):
        raise InputError(f"{path}: not an image that OpenCV can read; give a PNG, JPG, TIFF or BMP file")
    if len({page.shape[:2] for page in pages}) > 1:
        raise InputError(f"{path}: its {len(pages)} pages differ in size; save the one to use as a picture of its own")
    # 16 bits that hold 8 stay as they are
    small = all(page.dtype == np.uint16 and page.max() <= 255 for page in pages)
    pages = [page.astype(np.uint8) if small else page for page in pages]
    return [np.ascontiguousarray(page[..., ::-1]) if page.ndim == 3 else page for page in pages]  # OpenCV reads BGR


def _is_gray(page: np.ndarray) -> bool:
    """Whether a page (H, W) or (H, W, 3) has no colour."""
    return page.ndim == 2 or bool((page == page[..., :1]).all())


def _is_soft(labels: np.ndarray) -> bool:
    """Whether a mask is one object of 255 with values between at its edge, which are a tenth of it or less."""
    if labels.dtype != np.uint8:
        return False
    counts = np.bincount(labels.ravel(), minlength=256)
    between = counts[1:255]
    return bool(np.count_nonzero(between) >= 3 and 0 < between.sum() <= 0.1 * counts[255])


def _palette_indices(path: Path) -> np.ndarray | None:
    """The numbers of an indexed picture, (H, W) uint8; None if it has no palette. OpenCV gives only their colours."""
    if path.suffix.lower() not in (".png", ".tif", ".tiff") or not path.is_file():
        return None
    from PIL import Image, UnidentifiedImageError  # only here: masks, and nothing else, need it

    try:
        with Image.open(path) as picture:
            is_indexed = picture.mode == "P" and getattr(picture, "n_frames", 1) == 1
            return np.array(picture) if is_indexed else None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # OpenCV says what is wrong


def _labels_of_colours(pixels: np.ndarray, path: Path) -> np.ndarray:
    """A colour mask (H, W, 3) -> (H, W) label numbers; a gray one -> its values."""
    if _is_gray(pixels):
        return pixels[..., 0]
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, labels, counts = np.unique(codes, return_inverse=True, return_counts=True)
    if len(colours) > MAX_COLOURS or path.suffix.lower() in (".jpg", ".jpeg"):
        advice = "give label numbers in one gray channel, or one colour for each object"
        raise InputError(f"{path}: is a colour picture of {len(colours)} colours, not a mask; {advice}")
    background = 0 if colours[0] == 0 else int(np.argmax(counts))
    numbers = np.insert(np.arange(1, len(colours)), background, 0)
    return numbers[labels].reshape(pixels.shape[:2]).astype(np.uint16)
