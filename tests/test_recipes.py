"""Data sets by name: each public data set is found in a folder of its layout, and another layout is told in a sentence."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest

from data import load_entry
from demo_data import tiny_case
from formats import SUBMODALITIES, InputError, modality_of, submodality_of
from formats.sources import DATA_SETS, Options, list_data_set
from formats.writing import save_image, save_json, save_npz

preprocess = importlib.import_module("01_preprocess")  # `import 01_preprocess` is a syntax error

LAYOUTS = {  # files of the download -> name of the case, image, labels
    "nuclei": (
        ["BBBC006/a 1.jpg", "stage_1_train/0ab.jpg", "annotations/BBBC006.json", "annotations/stage1_train.json"],
        [("nuclei_BBBC006_a 1", "BBBC006/a 1.jpg", "annotations/BBBC006.json"),
         ("nuclei_stage_1_train_0ab", "stage_1_train/0ab.jpg", "annotations/stage1_train.json")],
    ),
    "btcv": (
        ["RawData/Training/img/img0001.nii.gz", "RawData/Training/label/label0001.nii.gz", "imagesTr/img0002.nii.gz",
         "labelsTr/label0002.nii.gz", "img0003.nii.gz", "label0003.nii.gz"],
        [("btcv_0001", "RawData/Training/img/img0001.nii.gz", "RawData/Training/label/label0001.nii.gz"),
         ("btcv_0002", "imagesTr/img0002.nii.gz", "labelsTr/label0002.nii.gz"),
         ("btcv_0003", "img0003.nii.gz", "label0003.nii.gz")],
    ),
    "microus": (
        ["Set/train/micro_ultrasound_scans/microUS_train_01.nii.gz",
         "Set/train/expert_annotations/expert_annotation_train_01.nii.gz",
         "Set/train/non_expert_annotations/nonexpert_annotation_train_01.nii.gz",
         "Set/test/micro_ultrasound_scans/microUS_test_01.nii.gz"],
        [("microUS_train_01", "Set/train/micro_ultrasound_scans/microUS_train_01.nii.gz",
          "Set/train/expert_annotations/expert_annotation_train_01.nii.gz")],
    ),
    "flare22": (
        ["FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz", "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz"],
        [("CT_FLARE22_Tr_0001", "FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz",
          "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz")],
    ),
    "hipxray": (
        ["images/1.nii.gz", "labels/1.nii.gz", "images/2.jpg", "masks/2.png"],
        [("hipxray_1", "images/1.nii.gz", "labels/1.nii.gz"), ("hipxray_2", "images/2.jpg", "masks/2.png")],
    ),
    "toothseg": (
        ["Teeth Segmentation JSON/d2/img/1.jpg", "Teeth Segmentation JSON/d2/ann/1.jpg.json",
         "Teeth Segmentation JSON/d2/masks_machine/1.png", "Teeth Segmentation JSON/meta.json"],
        [("teeth_1", "Teeth Segmentation JSON/d2/img/1.jpg", "Teeth Segmentation JSON/d2/ann/1.jpg.json")],
    ),
    "challenge": (
        ["CT/AMOS/CT_AMOS_amos_0001.npz", "XRay/CXR/2D_X-Ray_b_7.npz", "Dermoscopy/ISIC/isic_3.npz", "readme.txt"],
        [("2D_X-Ray_b_7", "XRay/CXR/2D_X-Ray_b_7.npz", None), ("CT_AMOS_amos_0001", "CT/AMOS/CT_AMOS_amos_0001.npz", None),
         ("Dermoscopy_ISIC_isic_3", "Dermoscopy/ISIC/isic_3.npz", None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA_SETS)
def test_images_and_labels_are_found_in_the_data_set_s_layout(name, tmp_path):
    files, wanted = LAYOUTS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    options, cases, problems = list_data_set(name, tmp_path, Options())
    assert sorted(cases) == [(case, tmp_path / image, labels and tmp_path / labels) for case, image, labels in wanted]
    assert not problems and all(modality_of(case) != "Other" for case, *_ in cases)
    assert options.window == ((400, 40) if name in ("btcv", "flare22") else None)
    assert options.dropped == ((12,) if name == "flare22" else ())
    mine, *_ = list_data_set(name, tmp_path, Options((1500, -600), (), True, 9))
    assert mine == Options((1500, -600), options.dropped, True, 9)


def test_the_challenge_s_34_groups_are_known_by_name():
    assert len(SUBMODALITIES) == 34
    assert all(submodality_of(f"{group}_case_0001") == group for group in SUBMODALITIES)


@pytest.mark.parametrize("name", DATA_SETS)
def test_another_layout_is_told_in_a_sentence_with_what_was_found(name, tmp_path):
    with pytest.raises(InputError, match="no such folder; download"):
        list_data_set(name, tmp_path / "none", Options())
    with pytest.raises(InputError, match=f"data set {name} looks like .* but of 0 files here, 0 are its images"):
        list_data_set(name, tmp_path, Options())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.mha").touch()
    with pytest.raises(InputError, match=r"but of 1 files here, such as other/file\.mha, 0 are .* name the") as caught:
        list_data_set(name, tmp_path, Options())
    assert "\n" not in str(caught.value)


def test_images_without_labels_are_told(tmp_path):
    for number in (1, 2):
        (tmp_path / f"img000{number}.nii.gz").touch()
    with pytest.raises(InputError, match="2 are its images and none has labels"):
        list_data_set("btcv", tmp_path, Options())
    (tmp_path / "label0001.nii.gz").touch()
    _, cases, (problem,) = list_data_set("btcv", tmp_path, Options())
    assert len(cases) == 1 and "img0002.nii.gz: has no labels at" in str(problem)


def run(*args):
    return preprocess.main([*map(str, args), "--jobs", "1"])


def test_the_challenge_s_folders_become_a_cache(tmp_path):
    for place, dims, seed in (
        ("CT/AMOS/CT_AMOS_amos_0001", 3, 0),
        ("US/BUS/US_BUS_7", 2, 1),
        ("US/BUS/US_BUS_8", 2, 2),
    ):
        case = tiny_case(seed, dims)
        save_npz(tmp_path / "data" / f"{place}.npz", imgs=case.image, gts=case.labels)
    entries = run("--read", "dataset=challenge", "-i", tmp_path / "data", "-o", tmp_path / "cache")
    assert {e.submodality for e in entries} == {"CT_AMOS", "US"} and len(entries) == 7


def test_picture_pairs_of_a_recipe_become_a_cache(tmp_path, capsys):
    for seed in (1, 2, 3):
        case = tiny_case(seed)
        save_image(tmp_path / "data" / "images" / f"{seed}.png", case.image)
        save_image(tmp_path / "data" / "masks" / f"{seed}.png", np.minimum(case.labels, 1))
    save_image(tmp_path / "data" / "images" / "4.png", case.image)
    with pytest.raises(SystemExit, match="3 of 4 files done, 1 left out"):
        run("--read", "dataset=hipxray", "instances=yes", "-i", tmp_path / "data", "-o", tmp_path / "cache")
    told = capsys.readouterr().err
    assert "4.png: has no labels" in told
    lines = [json.loads(line) for line in (tmp_path / "cache" / "done.jsonl").read_text().splitlines() if line]
    assert [line["name"] for line in lines] == ["hipxray_1", "hipxray_2", "hipxray_3"]
    assert all(
        line["entries"][0]["modality"] == "X-Ray" and line["objects"] == 2 for line in lines
    )  # two parts of one label


def volume_pair(image, labels, seed=0):
    """A CT-like volume of 6 slices and its labels 1, 12 and 3 as NIfTI files, slices along the third axis."""
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(seed).integers(-900, 900, (48, 40, 6)).astype(np.int16)
    volume[0, 0, 0], volume[1, 0, 0] = -1024, 1500
    masks = np.zeros(volume.shape, np.int16)
    masks[5:15, 5:15, 1:4], masks[20:30, 5:15, 2:5], masks[20:30, 20:30, 2] = 1, 12, 3
    for path, array in ((image, volume), (labels, masks)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 3.0, 1.0])), path)


@pytest.mark.parametrize(
    "name, window, kept", [("btcv", "400/40", {1, 3, 12}), ("flare22", "400/40", {1, 3}), ("microus", None, {1, 3, 12})]
)
def test_volumes_of_a_recipe_become_a_cache(name, window, kept, tmp_path):
    for number in (1, 2):
        _, image, labels = next(case for case in LAYOUTS[name][1])
        there = [tmp_path / "data" / path.replace("01", f"0{number}", 1) for path in (image, labels)]
        volume_pair(*there, seed=number)
    entries = run("--read", f"dataset={name}", "-i", tmp_path / "data", "-o", tmp_path / "cache")
    found = {label for e in entries for label in np.unique(load_entry(tmp_path / "cache", e)[1]).tolist()}
    assert found == {0, *kept} and len({e.patient for e in entries}) == 2
    assert {e.modality for e in entries} == {"US" if name == "microus" else "CT"}
    assert {(e.low, e.high) for e in entries} == {(-1024.0, 1500.0)}
    assert window is None or {e.window for e in entries} == {window}


def test_nuclei_of_a_coco_file_become_a_cache(tmp_path):
    images, objects = [], []
    for number in (1, 2):
        case = tiny_case(number)
        save_image(tmp_path / "data" / "BBBC006" / f"{number}.jpg", case.image)  # PNG data under this name reads too
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 80})
        for label in (1, 2):
            flat = (case.labels == label).ravel(order="F")  # COCO counts down the columns, background first
            ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
            counts = np.diff([0, *ends, flat.size]).tolist()
            objects.append({"image_id": number, "category_id": 1, "segmentation": {"size": [64, 80], "counts": counts}})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "nucleus"}]}
    save_json(tmp_path / "data" / "annotations" / "BBBC006.json", content)
    entries = run("--read", "dataset=nuclei", "-i", tmp_path / "data", "-o", tmp_path / "cache")
    assert [(e.name, e.objects, e.submodality) for e in entries] == [
        ("nuclei_BBBC006_1", 2, "nuclei"), ("nuclei_BBBC006_2", 2, "nuclei"),
    ]  # fmt: skip


def test_teeth_of_supervisely_files_become_a_cache(tmp_path, capsys):
    for number in (1, 2):
        save_image(tmp_path / "data" / "d2" / "img" / f"{number}.jpg", tiny_case(number).image)
        square = {"exterior": [[10, 10], [30, 10], [30, 30], [10, 30]], "interior": []}
        tooth = {"classTitle": "11", "geometryType": "polygon", "points": square}
        content = {"size": {"height": 64, "width": 80}, "objects": [tooth]}
        save_json(tmp_path / "data" / "d2" / "ann" / f"{number}.jpg.json", content)
    entries = run("--read", "dataset=toothseg", "-i", tmp_path / "data", "-o", tmp_path / "cache")
    assert "data set toothseg: its layout is not certain, look at some cached masks" in capsys.readouterr().err
    assert [(e.name, e.objects, e.modality) for e in entries] == [("teeth_1", 1, "X-Ray"), ("teeth_2", 1, "X-Ray")]


def test_dropped_labels_are_background(tmp_path, monkeypatch):
    case = tiny_case(0, 3)
    folder = tmp_path / "data"
    for seed in (1, 2):
        save_npz(folder / f"CT_a_{seed}.npz", imgs=case.image, gts=np.array([0, 12, 3], np.uint16)[case.labels])
    monkeypatch.setitem(DATA_SETS, "challenge", replace(DATA_SETS["challenge"], dropped=(12,)))
    entries = run("--read", "dataset=challenge", "-i", folder, "-o", tmp_path / "cache")
    assert entries and {n for e in entries for n in np.unique(load_entry(tmp_path / "cache", e)[1]).tolist()} == {0, 3}
