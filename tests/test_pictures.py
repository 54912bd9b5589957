"""Pictures, masks and COCO files of kinds that other tools were reported to read wrongly: read rightly, or told in a sentence.

Files are written by tifffile, Pillow and OpenCV; the right value is the array that was written, or what another library says.
"""

import csv
import importlib
import json
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageOps
from test_infer import fake  # noqa: F401  the stand-in for a model
from test_readers import sentence

from demo_data import tiny_case
from formats import InputError
from formats.annotations import coco_boxes, read_coco
from formats.case import paint
from formats.npz import write_case
from formats.partners import label_files
from formats.pictures import read_image, read_mask
from formats.readers import list_cases, read_boxed, read_case
from formats.writing import save_image

preprocess, infer, evaluate = map(importlib.import_module, ("01_preprocess", "04_infer", "05_evaluate"))

RAMP = np.sort(np.random.default_rng(0).integers(300, 60_000, (6, 40, 50)).reshape(6, -1)).reshape(6, 40, 50)
STACK = RAMP.astype(np.uint16)
COLOUR = np.stack([STACK[0], STACK[1] // 2, STACK[2]], -1)  # (40, 50, 3)


def tif(path, pixels, **how):
    tifffile.imwrite(path, pixels, **how)
    return path


def values_of(path):
    """The pixels before they become 8 bits."""
    from formats.pictures import _pixels

    return _pixels(path)[0]


def disc(shape, y, x, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def drawn(shape, discs, fine=8):
    """Discs (y, x, radius, value) with the soft edges that a drawing program gives them."""
    picture = Image.new("L", (shape[1] * fine, shape[0] * fine))
    for y, x, radius, value in discs:
        sides = [(x - radius) * fine, (y - radius) * fine, (x + radius) * fine - 1, (y + radius) * fine - 1]
        ImageDraw.Draw(picture).ellipse(sides, fill=value)
    return np.array(picture.resize(shape[::-1], Image.Resampling.BOX))


def boxes_in(labels):
    """{label: x_min, y_min, x_max, y_max}"""
    found = {}
    for label in np.unique(labels)[1:].tolist():
        y, x = np.nonzero(labels == label)
        found[label] = [int(n) for n in (x.min(), y.min(), x.max(), y.max())]
    return found


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "jpeg2000"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_colour_tiff_is_the_same_picture_however_it_is_stored(tmp_path, dtype, planes, compression):
    if compression == "jpeg2000" and dtype == np.float32:
        pytest.skip("JPEG 2000 holds whole numbers")
    pixels = (COLOUR // 256 if dtype == np.uint8 else COLOUR).astype(dtype)
    stored = np.moveaxis(pixels, -1, 0) if planes == "separate" else pixels
    path = tif(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes, compression=compression)
    assert np.array_equal(values_of(path), pixels) and read_case(path).image.shape == pixels.shape


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_shown_with_bright_as_bright(tmp_path, dtype):
    values = (STACK[0] // (256 if dtype == np.uint8 else 1)).astype(dtype)
    path = tif(tmp_path / "a.tif", values, photometric="miniswhite")
    assert np.corrcoef(read_case(path).image.ravel(), values.ravel())[0, 1] < -0.999
    if dtype == np.uint8:
        with Image.open(path) as shown:
            assert np.array_equal(read_case(path).image, np.asarray(shown))


HYPERSTACKS = {
    "ImageJ": ({"imagej": True}, "TZCYX", (1, 3, 2)), "OME": ({"ome": True}, "ZCYX", (3, 2)), "named": ({}, "ZCYX", (3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("how, axes, sizes", HYPERSTACKS.values(), ids=HYPERSTACKS)
def test_channels_of_a_hyperstack_are_named_and_never_slices(tmp_path, how, axes, sizes):
    path = tif(tmp_path / "a.tif", STACK.reshape(*sizes, 40, 50), metadata={"axes": axes}, **how)
    told = "has the axes Z 3, C 2, Y 40, X 50; save one channel of one time as a gray picture or volume"
    assert told in sentence(read_case, path)


def test_times_are_no_slices_and_pages_and_planes_in_depth_are(tmp_path):
    path = tif(tmp_path / "t.tif", STACK, metadata={"axes": "TYX"}, imagej=True)
    assert "has the axes T 6, Y 40, X 50; save one channel" in sentence(read_case, path)
    for name, how in (("z", {"metadata": {"axes": "ZYX"}}), ("plain", {})):
        assert np.array_equal(values_of(tif(tmp_path / f"{name}.tif", STACK, **how)), STACK)
    with tifffile.TiffWriter(tmp_path / "one_by_one.tif") as file:
        for page in STACK:
            file.write(page)
    assert np.array_equal(values_of(tmp_path / "one_by_one.tif"), STACK)


@pytest.mark.parametrize("how", [{}, {"compression": "lzw"}, {"imagej": True}, {"ome": True}, {"metadata": None}])
def test_a_tiff_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path, how):
    whole = tif(tmp_path / "whole.tif", STACK, **how).read_bytes()
    for end in np.linspace(0, len(whole), 60).astype(int)[:-1]:
        (tmp_path / "cut.tif").write_bytes(whole[:end])
        try:  # the last bytes may be such that no page needs them
            assert np.array_equal(values_of(tmp_path / "cut.tif"), STACK), end
        except InputError as error:
            assert "cut short" in str(error) or "can't read it" in str(error) or "holds pictures" in str(error)


def test_what_a_tiff_claims_is_checked_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tif(tmp_path / "a.tif", STACK[0], metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(60_000)
    assert "can't hold the (1, 60000, 60000) voxels that it claims" in sentence(read_case, path)
    monkeypatch.setattr("formats.case.MOST_BYTES", STACK.nbytes - 1)
    assert "; crop it, or set GRAYS_LIMIT_GB=1" in sentence(read_case, tif(path, STACK))
    monkeypatch.undo()
    cmyk = np.dstack([COLOUR, COLOUR[..., :1]]).astype(np.uint8)
    assert "its colours are SEPARATED" in sentence(read_case, tif(path, cmyk, photometric="separated"))
    with tifffile.TiffWriter(path) as file:
        file.write(STACK[0]), file.write(STACK[0, :20])
    assert "holds pictures of several sizes or kinds ((40, 50), (20, 50))" in sentence(read_case, path)
    assert "2 colour pages" in sentence(read_case, tif(path, np.stack([COLOUR] * 2), photometric="rgb"))
    five = np.dstack([COLOUR, COLOUR[..., :2]])
    assert "Y 40, X 50, C 5" in sentence(read_case, tif(path, five, photometric="minisblack", planarconfig="contig"))


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("mark", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif"])
def test_a_photo_and_its_mask_are_turned_alike_or_told(tmp_path, mark, ending):
    photo, mask = tmp_path / f"a{ending}", tmp_path / "a_mask.png"
    pixels, truth = np.full((40, 60), 60, np.uint8), disc((40, 60), 12, 40, 9)
    pixels[truth] = 220
    exif = Image.Exif()
    exif[274] = mark
    Image.fromarray(pixels).save(photo, **({"tiffinfo": {274: mark}} if ending == ".tif" else {"exif": exif}))
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened))
    assert np.abs(read_image(photo).astype(int) - shown).max() <= 40  # JPEG smears its edge

    def lies_on_the_lesion():
        case = read_case(photo)
        return np.count_nonzero((case.labels > 0) & (case.image > 140)) > 0.95 * truth.sum()

    Image.fromarray(truth).save(mask, exif=exif)  # both have the mark
    assert lies_on_the_lesion()
    Image.fromarray(truth).save(mask)  # drawn on the photo as stored
    if mark == 1 or mark > 4:
        assert lies_on_the_lesion()
    else:
        text = sentence(read_case, photo)
        assert f"(EXIF orientation {mark}, this file: 1), and nothing says on which view" in text
    Image.fromarray(shown > 140).save(mask)  # drawn on the photo as shown
    if mark == 1 or mark > 4:
        assert lies_on_the_lesion()


def test_a_square_photo_on_its_side_does_not_say_how_its_mask_lies(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(drawn((40, 40), [(10, 30, 8, 255)])).save(tmp_path / "a.jpg", exif=exif)
    save_image(tmp_path / "a_mask.png", disc((40, 40), 10, 30, 8).astype(np.uint8))
    assert "nothing says on which view" in sentence(read_case, tmp_path / "a.jpg")


# ---------------------------------------------------------------- masks


def enlarged(mask, factor, how):
    size = [round(side * factor) for side in mask.shape[::-1]]
    return np.array(Image.fromarray(mask).resize(size, how))


SMALL, ONE = drawn((50, 65), [(25, 32, 9, 255)]), (disc((50, 65), 25, 32, 9) * 255).astype(np.uint8)
SOFT = {
    **{f"drawn, radius {r}": drawn((150, 200), [(70, 90, r, 255)]) for r in (2, 5, 20, 60)},
    **{f"{how.name} x{k}": enlarged(ONE, k, how) for k in (2, 2.5, 4, 8) for how in list(Image.Resampling)[1:]},
    **{f"soft, enlarged by blocks x{k}": enlarged(SMALL, k, Image.Resampling.NEAREST) for k in (2, 2.5, 4, 8)},
    **{f"blurred by {s}": cv2.GaussianBlur(enlarged(ONE, 4, Image.Resampling.NEAREST), (0, 0), s) for s in (1, 4)},
    "of 16 bits": SMALL.astype(np.uint16) * 257, "three discs": drawn((150, 200), [(40, 40, 9, 255), (90, 90, 20, 255), (120, 160, 4, 255)]),
    "faint": drawn((150, 200), [(70, 90, 20, 128)]),
}  # fmt: skip


@pytest.mark.parametrize("soft", SOFT.values(), ids=SOFT)
def test_a_mask_with_soft_edges_is_one_object_cut_at_half(tmp_path, soft):
    save_image(tmp_path / "a.png", soft)
    found, half = read_mask(tmp_path / "a.png"), soft > soft.max() / 2
    assert np.unique(found).tolist() == [0, 1] or len(np.unique(soft)) == 2
    assert np.count_nonzero((found > 0) != half) <= 0.02 * half.sum()


CLASSES = [(60, 60, 40, 128), (130, 200, 35, 255), (60, 200, 25, 200)]


@pytest.mark.parametrize("quality", [30, 50, 75, 90, 95, 100])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_classes_that_jpeg_smeared_are_found_or_told(tmp_path, quality, count, ending):
    truth = np.zeros((200, 260), np.uint8)
    for y, x, radius, value in CLASSES[:count]:
        truth[disc(truth.shape, y, x, radius)] = value
    Image.fromarray(truth).save(tmp_path / "a.jpg", quality=quality)
    path = tmp_path / f"a{ending}"
    Image.open(tmp_path / "a.jpg").save(path)  # .png: a JPEG that was saved anew, without loss
    try:
        found = read_mask(path)
    except InputError as error:
        assert ending == ".png" and quality == 100 and "soft edges and hard ones" in str(error)
        return
    wanted = {i + 1: boxes_in(truth)[value] for i, value in enumerate(sorted(boxes_in(truth)))}
    assert found.max() == count
    assert all(np.abs(np.subtract(box, wanted[label])).max() <= 3 for label, box in boxes_in(found).items())


@pytest.mark.parametrize("inner", [(100, 130, 20, 255), (40, 210, 20, 255), (100, 130, 3, 255)])
def test_the_slope_of_a_bright_class_is_not_taken_for_a_darker_one(tmp_path, inner):
    save_image(tmp_path / "a.png", drawn((200, 260), [(100, 110, 50, 128), inner]))
    found, (y, x, radius, _) = read_mask(tmp_path / "a.png"), inner
    assert np.abs(np.subtract(boxes_in(found)[1], [60, 50, 159, 149])).max() <= 1
    assert np.abs(np.subtract(boxes_in(found)[2], [x - radius, y - radius, x + radius - 1, y + radius - 1])).max() <= 1


def test_label_numbers_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    places, (y, x) = rng.integers(0, 200, (150, 2)), np.mgrid[:200, :200]
    cells = (((y[..., None] - places[:, 0]) ** 2 + (x[..., None] - places[:, 1]) ** 2).argmin(-1) + 1).astype(np.uint8)
    apart, dots = np.zeros((2, 200, 200), np.uint16)
    for i, (row, column) in enumerate(places):
        apart[disc(apart.shape, row, column, rng.integers(2, 12))] = i + 1
        dots[row : row + rng.integers(1, 4), column : column + rng.integers(1, 4)] = 3 * i + 1
    layers = np.repeat(np.arange(10), [40, 10, 2, 3, 1, 2, 5, 20, 1, 16])[:, None] + np.zeros((1, 60), int)
    ring = disc((60, 60), 30, 30, 20) * 1 + disc((60, 60), 30, 30, 18)  # a wall of 2 pixels
    for labels in (cells, apart, dots, layers.astype(np.uint8), ring.astype(np.uint8)):
        save_image(tmp_path / "a.png", labels)
        assert np.array_equal(read_mask(tmp_path / "a.png"), labels)
    save_image(tmp_path / "a.png", (ring * 127).astype(np.uint8))
    assert "has values, 127, at the edges of others alone" in sentence(read_mask, tmp_path / "a.png")


def test_what_is_no_mask_is_told(tmp_path):
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8), (5, 5), 1)
    faint = disc((90, 90), 40, 40, 20).astype(np.uint8)
    for name, pixels, words in (
        ("photo.png", noise, "values that run into each other"),
        ("photo.jpg", noise, "values that run into each other"),
        (
            "gradient.png",
            np.arange(90, dtype=np.uint8) + np.zeros((90, 1), np.uint8),
            "values that run into each other",
        ),
        ("numbers.jpg", faint, "objects too faint or too small to stand out"),
        ("dot.png", drawn((90, 90), [(30, 30, 20, 128), (70, 70, 1.5, 255)]), "too faint or too small to stand out"),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        text = sentence(read_mask, tmp_path / name)
        assert words in text and text.endswith("save label numbers 1, 2, ..., without smoothing and not as JPEG")


OBJECT = disc((60, 80), 20, 55, 11)
BOX = [45, 10, 65, 30]
WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)


def palette(path, numbers, *colours):
    picture = Image.fromarray(numbers.astype(np.uint8))
    picture.putpalette(np.ravel(colours).tolist())
    picture.save(path)
    return path


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("stored", [OBJECT, ~OBJECT], ids=["object is high", "object is 0"])
@pytest.mark.parametrize("high", [True, 1, 255, 65_535])
def test_a_tiff_mask_gives_the_objects_box_or_a_sentence(tmp_path, photometric, stored, high):
    dtype = bool if high is True else np.uint16 if high > 255 else np.uint8
    path = tif(tmp_path / "a.tif", (stored * high).astype(dtype), photometric=photometric)
    if stored is not OBJECT and photometric == "minisblack" and high == 1 and high is not True:
        return  # 1 is a label number: it is taken as it stands
    try:
        assert list(boxes_in(read_mask(path)).values()) == [BOX]
    except InputError as error:
        assert (photometric == "minisblack" or high == 1) and "its background may be the object" in str(error)


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize(
    "numbers, colours, is_read",
    [
        (~OBJECT, (WHITE, BLACK), True), (OBJECT, (WHITE, BLACK), True), (OBJECT, (BLACK, WHITE), True),
        (~OBJECT, (BLACK, WHITE), False), (~OBJECT, (RED, BLACK), True), (~OBJECT, (RED, GREEN), False),
        (OBJECT, (RED, GREEN), True),
    ],
)  # fmt: skip
def test_a_palette_in_any_order_gives_the_objects_box_or_a_sentence(tmp_path, numbers, colours, is_read, ending):
    path = palette(tmp_path / f"a{ending}", numbers, *colours)
    if is_read:
        assert list(boxes_in(read_mask(path)).values()) == [BOX]
    else:
        assert "background" in sentence(read_mask, path)


def test_colour_masks_with_soft_edges_and_palettes_chosen_by_a_program(tmp_path):
    red, green = drawn((200, 260), [(60, 60, 30, 255)]), drawn((200, 260), [(130, 180, 30, 200)])
    colours = np.stack([red, green, 0 * red], -1)
    for picture in (Image.fromarray(colours), Image.fromarray(255 - colours)):
        for kind in (picture, picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)):
            kind.save(tmp_path / "a.png")
            try:
                found = boxes_in(read_mask(tmp_path / "a.png"))
            except InputError as error:
                assert kind.mode == "P" and "save" in str(error)
                continue
            assert np.abs(np.subtract(sorted(found.values()), [[30, 30, 89, 89], [150, 100, 209, 159]])).max() <= 1
    save_image(tmp_path / "a.png", (~OBJECT * 255).astype(np.uint8))
    assert "its border is white" in sentence(read_mask, tmp_path / "a.png")
    alpha = np.dstack([np.full((60, 80, 3), 255), OBJECT * 255]).astype(np.uint8)
    Image.fromarray(alpha).save(tmp_path / "a.png")
    assert "its border is white" in sentence(read_mask, tmp_path / "a.png"), "the object lies in alpha alone"


def test_masks_that_overlap_keep_their_boxes_and_what_is_hidden_is_told(tmp_path, capsys):
    large, small = disc((60, 80), 30, 40, 25), disc((60, 80), 30, 40, 8)
    save_image(tmp_path / "a.png", tiny_case().image[:60])
    for name, mask in (("1_small", small), ("2_large", large)):
        save_image(tmp_path / f"a_mask_{name}.png", (mask * 255).astype(np.uint8))
    case = read_case(tmp_path / "a.png", boxes_from_masks=True)
    assert case.label_names == ("a_mask_1_small", "a_mask_2_large") and case.labels[30, 40] == 1
    assert case.boxes.tolist() == [boxes_in(small)[1], boxes_in(large)[1]]
    assert f"object 2 (a_mask_2_large) {small.sum():,} of {large.sum():,}" in capsys.readouterr().err
    labels, _ = paint([large, large], ["", ""], "here")
    assert np.unique(labels).tolist() == [0, 2]
    assert f"object 1 {large.sum():,} of {large.sum():,}" in capsys.readouterr().err
    paint([small, disc((60, 80), 5, 5, 4)], ["a", "b"], "here")
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- COCO


def coco(folder, annotations, names=("a.png",)):
    """A COCO file of images of 40 x 50 pixels, and the first image."""
    images = [{"id": i, "file_name": name, "height": 40, "width": 50} for i, name in enumerate(names)]
    objects = [{"image_id": 0, "category_id": 1} | one for one in annotations]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cyst"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    save_image(folder / "a.png", tiny_case().image[:40, :50])
    return folder / "instances.json"


SQUARE = [[10, 5, 20, 5, 20, 15, 10, 15]]


def test_an_object_with_a_box_and_no_outline_keeps_its_box_and_is_told(tmp_path, fake, capsys):  # noqa: F811
    coco(tmp_path, [{"segmentation": SQUARE}, {"segmentation": [], "bbox": [30, 20, 10.5, 8]}])
    for args, kind in (((), "drawn"), (("--boxes-from-masks",), "exact")):
        infer.main(["-i", str(tmp_path), "-o", str(tmp_path / kind), *args])
        with (tmp_path / kind / "objects.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["box"] for row in rows] == ["10 5 19 14", "30 20 39.5 27"]
        assert {(row["name"], row["boxes_are"]) for row in rows} == {("cyst", kind)}
        assert [row["label"] for row in rows] == ["1", "2"]
    capsys.readouterr()
    preprocess.main(["-i", str(tmp_path), "-o", str(tmp_path / "cache"), "--jobs", "1"])
    assert "a.png: object 2 (cyst) has no outline, so no mask" in capsys.readouterr().err


def test_crowds_are_no_objects_and_an_orphan_does_not_sink_the_file(tmp_path, capsys):
    whole = {"size": [40, 50], "counts": [0, 2000]}
    crowd, orphan = {"segmentation": whole, "iscrowd": 1}, {"segmentation": SQUARE, "image_id": 99}
    path = coco(tmp_path, [crowd, {"segmentation": SQUARE}, orphan])
    assert boxes_in(read_case(tmp_path / "a.png").labels) == {1: [10, 5, 19, 14]}
    assert "1 annotations left out, of images that it does not list" in capsys.readouterr().err
    assert coco_boxes(path, Path("a.png"), (40, 50))[0].tolist() == [[10, 5, 19, 14]]


def test_one_name_in_two_folders_is_told_unless_the_folder_says_which(tmp_path):
    for folder in ("video1", "elsewhere"):
        (tmp_path / folder).mkdir()
        coco(tmp_path / folder, [{"segmentation": SQUARE}], ("video1/a.png", "video2\\a.png"))
    assert boxes_in(read_case(tmp_path / "video1" / "a.png").labels) == {1: [10, 5, 19, 14]}
    assert "lists video1/a.png, video2/a.png: which is" in sentence(read_case, tmp_path / "elsewhere" / "a.png")


BAD_OUTLINES = {
    "runs beyond the picture": ({"size": [40, 50], "counts": [10, 2**31]}, "its runs cover"),
    "packed runs beyond it": ({"size": [40, 50], "counts": "".join(["oooooo0"] * 3)}, "its runs cover"),
    "a number without end": ({"size": [40, 50], "counts": "o" * 100_000}, "has no end"),
    "negative runs": ({"size": [40, 50], "counts": [2100, -100]}, "its runs cover"),
    "another size": ({"size": [4000, 5000], "counts": [2000]}, "is for [4000, 5000]"),
    "two points": ([[1, 2, 3, 4]], "a polygon of 2 points"),
    "far outside": ([[0, 0, 1e9, 0, 1e9, 1e9]], "lies outside the image"),
    "no number": ([[0, 0, float("nan"), 0, 9, 9]], "lies outside the image"),
    "neither outline nor box": ([], "none, and no box"),
}


@pytest.mark.parametrize("outline, words", BAD_OUTLINES.values(), ids=BAD_OUTLINES)
def test_an_outline_that_claims_more_than_its_picture_never_reaches_pycocotools(tmp_path, monkeypatch, outline, words):
    from pycocotools import mask as tools

    for name in ("frPyObjects", "decode"):
        monkeypatch.setattr(tools, name, lambda *args: pytest.fail("pycocotools was asked"))
    path = coco(tmp_path, [{"segmentation": outline}])
    text = sentence(read_coco, path, Path("a.png"), (40, 50))
    assert "object 1 of a.png has no good outline" in text and words in text


def test_polygons_are_those_that_pillow_fills_and_two_files_of_one_image_are_told(tmp_path):
    path = coco(tmp_path, [{"segmentation": [[4, 6, 40, 9, 33, 31, 12, 36]]}])
    filled = Image.new("1", (50, 40))
    ImageDraw.Draw(filled).polygon([(4, 6), (40, 9), (33, 31), (12, 36)], fill=1)
    ours, theirs = read_coco(path, Path("a.png"), (40, 50))[0] > 0, np.asarray(filled)
    assert 2 * np.count_nonzero(ours & theirs) / (ours.sum() + theirs.sum()) > 0.95
    save_image(tmp_path / "b.png", tiny_case().image)
    save_image(tmp_path / "b_mask.png", tiny_case().labels.astype(np.uint8))
    save_image(tmp_path / "a_mask.png", theirs.astype(np.uint8))
    assert "has labels in instances.json, a_mask.png; merge them" in sentence(read_case, tmp_path / "a.png")
    assert read_case(tmp_path / "b.png").labels.any(), "the others are read"


# ---------------------------------------------------------------- a run goes on


def test_the_files_that_a_mac_leaves_are_no_cases_and_no_labels(tmp_path):
    for folder in ("images", "masks"):
        for i in range(3):
            name = f"p{i}.png"
            save_image(tmp_path / folder / name, tiny_case(i).image if folder == "images" else tiny_case(i).labels)
            (tmp_path / folder / f"._{name}").write_bytes(b"\0\5\x16\7" + bytes(160))
    images = tmp_path / "images"
    assert [path.name for path in list_cases(images)] == ["p0.png", "p1.png", "p2.png"]
    assert label_files(images / "p1.png") == [tmp_path / "masks" / "p1.png"]
    args = ["-i", str(images), "--masks", str(tmp_path / "masks"), "--read", "modality=US", "--jobs", "1"]
    assert len(preprocess.main([*args, "-o", str(tmp_path / "cache")])) == 3


def thirty_files(folder):
    """20 good pictures with masks and boxes, and ten bad files, each in its own way. -> their names"""
    good = [f"US_{i}.png" for i in range(20)]
    for i, name in enumerate(good):
        save_image(folder / name, tiny_case(i).image)
        save_image(folder / name.replace(".", "_mask."), tiny_case(i).labels.astype(np.uint8))
    (folder / "empty.png").write_bytes(b"")
    (folder / "note.jpg").write_text("no image")
    (folder / "cut.tif").write_bytes(tif(folder / "cut.tif", STACK).read_bytes()[:9000])
    tif(folder / "channels.tif", STACK[:2], metadata={"axes": "CYX"}, imagej=True)
    tif(folder / "holes.tif", np.where(STACK[0] > 9000, np.nan, 1).astype(np.float32))
    save_image(folder / "flat.png", np.full((40, 50), 7, np.uint8))
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "text.nii.gz").write_text("no volume")
    (folder / "folder.png").mkdir()
    one = pydicom.Dataset()
    one.Rows = one.Columns = 4
    one.RescaleSlope = "1.5"
    one.save_as(folder / "comma.dcm", implicit_vr=True, little_endian=True)
    (folder / "comma.dcm").write_bytes((folder / "comma.dcm").read_bytes().replace(b"1.5 ", b"1,5 "))
    bad = "empty.png note.jpg cut.tif channels.tif holes.tif flat.png loop.png text.nii.gz folder.png comma.dcm".split()
    rows = [f"{name},10,10,30,30" for name in good + bad]
    (folder / "boxes.csv").write_text("\n".join(["file,x0,y0,x1,y1", *rows]))
    return good, bad


def told_of(capsys, bad):
    """What was left out: one line for each of these names."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert len(lines) == len(bad) and all(
        sum(f"{name}:" in line or f"{name}'" in line for line in lines) == 1 for name in bad
    )


def test_ten_bad_files_of_thirty_do_not_keep_step_4_from_the_other_twenty(tmp_path, fake, capsys):  # noqa: F811
    good, bad = thirty_files(tmp_path)
    with pytest.raises(SystemExit, match="20 of 30 cases done, 10 left out as told above"):
        infer.main(["-i", str(tmp_path), "-o", str(tmp_path / "segs")])
    told_of(capsys, bad)
    assert {path.stem for path in (tmp_path / "segs").glob("*.npz")} == {name[:-4] for name in good}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ten_bad_files_of_thirty_do_not_keep_step_1_from_the_other_twenty(tmp_path, capsys, jobs):
    (tmp_path / "in").mkdir()
    good, bad = thirty_files(tmp_path / "in")
    bad = [name for name in bad if name != "folder.png"]  # an empty folder is no case
    with pytest.raises(SystemExit, match="20 of 29 files done, 9 left out as told above"):
        preprocess.main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "cache"), "--jobs", jobs])
    told_of(capsys, bad)
    assert len(list((tmp_path / "cache" / "imgs").glob("*.png"))) == 20


@pytest.mark.parametrize(
    "raised", [TypeError("no slope"), ValueError("1,5"), KeyError("x"), MemoryError(), RecursionError()]
)
def test_an_exception_that_no_reader_foresaw_is_told_with_its_type(tmp_path, monkeypatch, fake, capsys, raised):  # noqa: F811
    for i in range(2):
        write_case(tmp_path, tiny_case(i))
    names = [path.name for path in sorted((tmp_path / "imgs").iterdir())]
    real = np.load

    def load(file, **how):
        if str(getattr(file, "name", file)).endswith(names[0]):
            raise raised
        return real(file, **how)

    infer.main(["-i", str(tmp_path / "imgs"), "-o", str(tmp_path / "segs")])
    monkeypatch.setattr(np, "load", load)
    monkeypatch.setattr("formats.npz.load_npz", lambda path: dict(load(path, allow_pickle=False)))
    monkeypatch.setattr("formats.truth.load_npz", lambda path: dict(load(path, allow_pickle=False)))
    what = f"{names[0]}: can't be read ({type(raised).__name__}"
    with pytest.raises(SystemExit, match="1 of 2 cases done"):
        infer.main(["-i", str(tmp_path / "imgs"), "-o", str(tmp_path / "again")])
    assert what in capsys.readouterr().err
    steps = ["-s", str(tmp_path / "segs"), "-g", str(tmp_path / "gts"), "-o", str(tmp_path / "eval"), "--jobs", "1"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(steps)
    assert stop.value.code == 1 and what in capsys.readouterr().err and (tmp_path / "eval" / "table.md").is_file()


def test_boxes_of_a_coco_file_give_way_to_those_that_are_asked_for(tmp_path):
    coco(tmp_path, [{"segmentation": SQUARE}])
    assert read_boxed(tmp_path / "a.png", boxes=[[1, 2, 30, 20]]).boxes.tolist() == [[1, 2, 30, 20]]
    assert read_boxed(tmp_path / "a.png").boxes_are == "exact"
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,3,4,9,12\n")
    assert read_boxed(tmp_path / "a.png").boxes.tolist() == [[3, 4, 9, 12]]
