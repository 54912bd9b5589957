"""01_preprocess.py: every file of the cache, exact resuming, and one sentence for everything that is left out."""

import csv
import errno
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import load_entry, read_index
from demo_data import tiny_case
from formats import InputError, writing
from formats.cache import fingerprint
from formats.npz import load_npz, read_npz
from formats.partners import list_pairs
from formats.pictures import read_mask
from formats.writing import save_image, save_npz
from grid import boxes_from_labels, promptable_labels, resize_labels_to_grid

preprocess = importlib.import_module("01_preprocess")  # `import 01_preprocess` is a syntax error
ROOT = Path(__file__).parent.parent


def train_file(folder, seed, dims, name=None, labels=None):
    """One tiny case as a challenge training file."""
    case = tiny_case(seed, dims)
    spacing = {} if dims == 2 else {"spacing": np.array([1.0, 1.0, 3.0])}
    save_npz(
        folder / f"{name or case.name}.npz", imgs=case.image, gts=case.labels if labels is None else labels, **spacing
    )
    return case


@pytest.fixture
def folder(tmp_path):
    """Training files in tmp_path/train: three images and three volumes."""
    for seed in range(3):
        for dims in (2, 3):
            train_file(tmp_path / "train", seed, dims)
    return tmp_path


def run(folder, *more):
    return preprocess.main(["-i", str(folder / "train"), "-o", str(folder / "cache"), "--jobs", "1", *map(str, more)])


def sentence(*args):
    """What main(args) stops with: one line that names the script."""
    with pytest.raises(SystemExit) as stop:
        preprocess.main([str(arg) for arg in args])
    text = stop.value.code
    assert isinstance(text, str) and text.startswith("01_preprocess.py: ") and "\n" not in text
    return text


def left_out(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("01_preprocess.py: left out: ") for line in lines if "left out: " in line]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".png", ".pkl", ".npz")}


def test_a_folder_of_images_and_volumes_becomes_a_cache(folder, capsys):
    entries = run(folder)
    cache = folder / "cache"
    assert entries == read_index(cache) and len(entries) == 3 + 3 * 5
    assert sorted(path.name for path in cache.iterdir()) == [
        "arguments.json", "cases", "done.jsonl", "imgs", "index.csv", "masks", "version.json",
    ]  # fmt: skip
    assert {p.stem for p in (cache / "imgs").iterdir()} == {p.stem for p in (cache / "masks").iterdir()}
    assert {path.stem for path in (cache / "imgs").iterdir()} == {entry.name for entry in entries}
    for entry in entries:
        image, labels = load_entry(cache, entry)
        assert image.shape == labels.shape == (256, 256)
        source = load_npz(folder / "train" / entry.source)
        truth = source["gts"] if entry.source.startswith("2D") else source["gts"][int(entry.name[-3:])]
        small = resize_labels_to_grid(truth.astype(np.uint16))
        assert np.array_equal(labels[: small.shape[0], : small.shape[1]], small)
        assert len(np.unique(small)) - 1 == entry.objects
    for modality in ("US", "CT"):  # at least one case, and a volume is never cut
        held_out = {entry.patient for entry in entries if entry.modality == modality and entry.split == "val"}
        assert len(held_out) == 1
        assert held_out.isdisjoint({entry.patient for entry in entries if entry.split == "train"})
    assert json.loads((cache / "arguments.json").read_text())["val_share"] == 0.01
    out = capsys.readouterr().out.splitlines()
    assert "6 files with 12 objects" in out[0] and "holds 18 images with 36 objects, 12 train and 6 val" in out[0]
    assert out[0].endswith("left out: 3 images or slices without an object") and len(out) == 2
    assert out[1].endswith(f"Next: python 02_train.py --cache {cache}")


def test_validation_cases_are_challenge_inputs_at_their_own_size(folder):
    entries = run(folder)
    held_out = {entry.source for entry in entries if entry.split == "val"}
    assert len(held_out) == 2
    cases = folder / "cache" / "cases"
    assert {path.name for path in (cases / "imgs").iterdir()} == held_out  # these names have 2DBox, 3DBox already
    for name in held_out:
        source, case, truth = (
            load_npz(p) for p in (folder / "train" / name, cases / "imgs" / name, cases / "gts" / name)
        )
        assert set(case) - {"spacing"} == {"imgs", "boxes"} and case["boxes"].dtype == np.int64
        assert np.array_equal(case["imgs"], source["imgs"]) and np.array_equal(truth["gts"], source["gts"])
        assert np.array_equal(case["boxes"], boxes_from_labels(source["gts"])[1])
        if name.startswith("3D"):
            assert case["spacing"].tolist() == truth["spacing"].tolist() == [1.0, 1.0, 3.0]
        assert len(read_npz(cases / "imgs" / name).boxes) == 2  # step 04 takes it


def test_labels_of_validation_cases_are_numbered_from_one_and_thin_objects_left_out(tmp_path):
    labels = np.zeros((9, 9), np.uint16)
    labels[1:4, 1:4], labels[6, 2:7], labels[5:8, 8], labels[1:3, 6:8] = 300, 5, 6, 40_000
    truth, thin = promptable_labels(labels)
    assert thin == 2 and truth.dtype == np.uint16
    assert np.array_equal(truth == 1, labels == 300) and np.array_equal(truth == 2, labels == 40_000)
    one_slice, thin = promptable_labels(np.stack([labels * 0, labels * (labels == 300)]))
    assert thin == 0 and one_slice.max() == 1
    train_file(tmp_path / "train", 0, 2)
    save_npz(tmp_path / "val" / "2D_X-Ray_a_1.npz", imgs=labels.astype(np.uint8), gts=labels)
    run(tmp_path, "--val", tmp_path / "val")
    assert len(load_npz(tmp_path / "cache" / "cases" / "imgs" / "2DBox_X-Ray_a_1.npz")["boxes"]) == 2


def test_a_given_validation_folder_is_taken_in_place_of_a_draw(folder, capsys):
    train_file(folder / "val", 7, 2)
    train_file(folder / "val", 0, 2)  # a training file has this name too
    text = sentence("-i", folder / "train", "--val", folder / "val", "-o", folder / "cache", "--jobs", 1)
    assert "7 of 8 files done, 1 left out" in text
    assert "2DBox_US_tiny0.npz" in left_out(capsys)[0]
    entries = read_index(folder / "cache")
    assert {e.name for e in entries if e.split == "val"} == {"2DBox_US_tiny0", "2DBox_US_tiny7"}


def test_two_processes_write_the_same_bytes_as_one(folder):
    run(folder)
    preprocess.main(["-i", str(folder / "train"), "-o", str(folder / "two"), "--jobs", "2"])
    one, two = files_of(folder / "cache"), files_of(folder / "two")
    del one["arguments.json"], two["arguments.json"]
    assert one == two


def test_a_second_run_touches_nothing_and_repairs_what_is_damaged(folder):
    first = run(folder)
    cache = folder / "cache"
    content, times = files_of(cache), times_of(cache)
    assert run(folder) == first and times_of(cache) == times and files_of(cache) == content
    broken = [cache / "imgs" / f"{first[0].name}.png", cache / "masks" / f"{first[-1].name}.pkl"]
    broken[0].unlink()
    broken[1].write_bytes(broken[1].read_bytes()[:50])
    run(folder)
    assert files_of(cache) == content
    again = {entry.name for entry in first if entry.source in (first[0].source, first[-1].source)}  # their whole cases
    assert {path.stem for path, time in times_of(cache).items() if times.get(path) != time} == again


def test_an_interrupted_run_goes_on_where_it_stopped(folder, monkeypatch):
    wanted = run(folder, "-o", folder / "whole")

    def stop(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "split_entries", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert not (folder / "cache" / "index.csv").exists()
    times = times_of(folder / "cache")
    assert times and run(folder) == wanted
    assert times.items() <= times_of(folder / "cache").items()  # what was there is not written again


def test_the_split_is_never_drawn_again(folder):
    first = {entry.name: entry.split for entry in run(folder)}
    for seed in range(3, 30):
        train_file(folder / "train", seed, 2)
    again = {entry.name: entry.split for entry in run(folder, "--seed", 9)}
    assert first.items() <= again.items() and len(again) == len(first) + 27


def test_a_changed_file_is_done_again_and_a_second_folder_joins_the_first(folder):
    first = run(folder)
    labels = tiny_case(1, 3).labels.copy()
    kept = [z for z in range(len(labels)) if labels[z].any()][:2]
    labels[kept[1] + 1 :] = 0
    train_file(folder / "train", 1, 3, labels=labels)
    changed = run(folder)
    assert len([e for e in changed if e.source == "3DBox_CT_tiny1.npz"]) == 2 and len(changed) == len(first) - 3
    train_file(folder / "more", 0, 2, name="Fundus_new_1")
    joined = preprocess.main(["-i", str(folder / "more"), "-o", str(folder / "cache"), "--jobs", "1"])
    assert [entry for entry in joined if entry.name != "Fundus_new_1"] == changed and len(joined) == len(changed) + 1


def test_excluded_names_are_left_out_also_later(folder, capsys):
    names = folder / "names.txt"
    names.write_text("2DBox_US_tiny1\n\n3DBox_CT_tiny0-002 \n3DBox_CT_tiny2\n")
    run(folder)
    entries = run(folder, "--exclude", names)
    assert len(entries) == 18 - 1 - 1 - 5 and "2 files excluded" in capsys.readouterr().out
    assert not {"2DBox_US_tiny1", "3DBox_CT_tiny0-002", "3DBox_CT_tiny2-002"} & {entry.name for entry in entries}


# Pictures


def pictures(folder, n=3):
    """Pairs of picture and mask in folder/scans and folder/outlines."""
    for seed in range(n):
        case = tiny_case(seed)
        save_image(folder / "scans" / f"p{seed}-1.png", case.image)
        save_image(folder / "outlines" / f"p{seed}-1.png", case.labels)
    return ["-i", folder / "scans", "--masks", folder / "outlines", "--read", "modality=US_Mine", "-o", folder / "cache",
            "--jobs", "1"]  # fmt: skip


def write_picture(path, pixels):
    cv2.imencode(path.suffix, pixels)[1].tofile(path)


def test_picture_folders_in_every_format_become_a_cache(tmp_path):
    args = pictures(tmp_path)
    case = tiny_case(5)
    color = np.stack([case.image, case.image // 2, case.image // 3], -1)
    for ending in (".bmp", ".tif", ".jpg"):
        write_picture(tmp_path / "scans" / f"x{ending[1:]}7{ending}", color)
        mask = (
            np.where(case.labels == 1, 255, 0) if ending == ".jpg" else case.labels * (1 if ending == ".bmp" else 400)
        )
        write_picture(
            tmp_path / "outlines" / f"x{ending[1:]}7{ending}", mask.astype(np.uint8 if ending != ".tif" else np.uint16)
        )
    entries = {entry.name: entry for entry in preprocess.main([str(arg) for arg in args])}
    assert set(entries) == {f"US_Mine_{stem}" for stem in ("p0-1", "p1-1", "p2-1", "xbmp7", "xtif7", "xjpg7")}
    assert entries["US_Mine_p0-1"].patient == "US_Mine_p0" and entries["US_Mine_p0-1"].submodality == "US"
    assert load_entry(tmp_path / "cache", entries["US_Mine_xbmp7"])[0].shape == (256, 256, 3)
    found = {stem: np.unique(load_entry(tmp_path / "cache", entries[f"US_Mine_{stem}"])[1]).tolist()
             for stem in ("xbmp7", "xtif7", "xjpg7")}  # fmt: skip
    assert found == {"xbmp7": [0, 1, 2], "xtif7": [0, 400, 800], "xjpg7": [0, 1]}  # JPEG smears: one object
    assert sum(entry.split == "val" for entry in entries.values()) == 1


def test_bad_pictures_are_told_in_a_sentence_and_the_others_are_done(tmp_path, capsys):
    args = pictures(tmp_path, 2)
    scans, outlines = tmp_path / "scans", tmp_path / "outlines"
    gray, labels = tiny_case().image, tiny_case().labels
    cases = {
        "cut": ("not an image that OpenCV can read", gray, None),
        "color": (" colours, not a mask", gray, np.random.default_rng(0).integers(0, 255, (64, 80, 3))),
        "empty": ("the mask holds no object", gray, labels * 0),
        "high": ("labels range from 0 to 70000, allowed are 0 to 65535", gray, labels.astype(np.int32) * 35_000),
        "size": ("label map has shape (64, 79) but the image has (64, 80)", gray, labels[:, :-1]),
        "flat": ("every value is 40000, so there is nothing to see", np.full_like(gray, 1, np.uint16) * 40_000, labels),
    }
    for stem, (_, image, mask) in cases.items():
        save_image(scans / f"{stem}.png", image)
        if mask is not None:
            write_picture(outlines / f"{stem}.tif", mask)
    (outlines / "cut.png").write_bytes((outlines / "p0-1.png").read_bytes()[:40])
    save_image(scans / "lone_image.png", gray)
    save_image(outlines / "lone_mask.png", labels)
    save_image(scans / "p1-1.bmp.png", gray)
    write_picture(scans / "p1-1.bmp", gray)  # a second p1-1
    text = sentence(*args)
    told = left_out(capsys)
    assert text == "01_preprocess.py: 1 of 11 files done, 10 left out as told above."
    assert len(told) == 10
    for words, *_ in cases.values():
        assert len([line for line in told if words in line]) == 1, words
    assert sum("has no partner named" in line for line in told) == 3
    assert sum("p1-1.bmp, p1-1.png, p1-1.png share one name" in line for line in told) == 1
    assert [entry.name for entry in read_index(tmp_path / "cache")] == ["US_Mine_p0-1"]


def test_folders_without_pictures_are_told(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        list_pairs(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="holds no PNG, JPG, TIFF, BMP, NIfTI, NRRD or MHA file"):
        list_pairs(tmp_path / "a", tmp_path / "a")


def test_a_gray_mask_in_three_channels_is_read(tmp_path):
    labels = tiny_case().labels.astype(np.uint8)
    save_image(tmp_path / "a.png", np.stack([labels] * 3, -1))
    assert np.array_equal(read_mask(tmp_path / "a.png"), labels)


# Bad input


def test_bad_npz_files_are_told_and_an_image_without_object_is_only_counted(folder, capsys):
    train = folder / "train"
    image = np.full((20, 30), 9, np.uint8)
    (train / "US_a_1.npz").write_bytes((train / "2DBox_US_tiny0.npz").read_bytes()[:300])
    save_npz(train / "US_b_1.npz", imgs=image, gts=image[:, 1:])
    save_npz(train / "US_c_1.npz", imgs=image, gts=image * np.int64(10_000))
    save_npz(train / "US_d_1.npz", imgs=image, boxes=np.array([[1, 1, 9, 9]]))
    save_npz(train / "US_e_1.npz", imgs=image, gts=image * 0)  # no object: counted, not an error
    np.savez(train / "US_f_1.npz", imgs=image, gts=np.array([{}], object))
    text = sentence("-i", train, "-o", folder / "cache", "--jobs", 2)
    assert text == "01_preprocess.py: 7 of 12 files done, 5 left out as told above."
    output = capsys.readouterr()
    told = [line for line in output.err.splitlines() if "left out: " in line]
    words = ("truncated", "they must agree", "allowed are 0 to 65535", "has no key 'gts'", "could run code")
    for line, name, word in zip(told, "abcdf", words, strict=True):
        assert f"US_{name}_1.npz" in line and word in line
    assert "left out: 4 images or slices without an object" in output.out
    assert len(read_index(folder / "cache")) == 18


def test_a_picture_with_the_name_of_a_slice_is_told_and_enters_no_index(tmp_path):
    train, cache = tmp_path / "train", tmp_path / "cache"
    train_file(train, 1, 2, name="CT_b-002")
    train_file(train, 2, 3, name="CT_b")  # its slices 2, 3, ... follow, but slice 2 has the picture's name
    text = sentence("-i", train, "-o", cache, "--jobs", 1)
    assert "two cases give an image CT_b-002; rename one of them, and start with an empty --out" in text
    assert not (cache / "index.csv").exists()
    train_file(train, 2, 2, name="CT_b-099")  # CT_b has no slice 99
    next(train.glob("*CT_b-002.npz")).unlink()
    preprocess.main(["-i", str(train), "-o", str(tmp_path / "new"), "--jobs", "1"])
    assert {"CT_b-002", "CT_b-099"} < {entry.name for entry in read_index(tmp_path / "new")}


def test_a_patient_on_both_sides_is_told_and_is_no_error(tmp_path, capsys):
    for patient in range(7):
        for folder, view in (("train", "L"), ("train", "R"), ("val", "M")):
            train_file(tmp_path / folder, patient, 2, name=f"US_mine_{patient}-{view}")
    train_file(tmp_path / "train", 8, 2, name="US_mine_8-L")
    entries = run(tmp_path, "--val", tmp_path / "val")
    told = [line for line in capsys.readouterr().err.splitlines() if "patient" in line]
    assert len(entries) == 22 and len(told) == 1
    assert told[0].startswith(
        "01_preprocess.py: patients in training and in validation: 7, such as US_mine_0, US_mine_1, US_mine_2; scores "
        "will be too good"
    )
    (tmp_path / "other").mkdir()
    preprocess.main(["-i", str(tmp_path / "train"), "-o", str(tmp_path / "other"), "--jobs", "1"])
    assert "patient" not in capsys.readouterr().err  # a split that is drawn never cuts a patient apart


def test_a_modality_without_a_validation_image_is_named(tmp_path, capsys):
    for name in ("US_a_1", "US_a_2", "CT_a_1"):
        train_file(tmp_path / "train", 0, 2, name=name)
    run(tmp_path)
    assert "; no validation image of CT, whose patients are too few" in capsys.readouterr().out


def test_an_index_without_a_version_is_no_cache_of_this_one(folder):
    run(folder)
    (folder / "cache" / "version.json").unlink()
    assert "no cache here (no good version.json)" in sentence("-i", folder / "train", "-o", folder / "cache")
    assert not (folder / "cache" / "version.json").exists()


def test_if_nothing_is_good_there_is_no_index(tmp_path):
    save_npz(tmp_path / "train" / "US_a_1.npz", imgs=np.zeros((9, 9), np.uint8), gts=np.zeros((9, 9), np.uint8))
    text = sentence("-i", tmp_path / "train", "-o", tmp_path / "cache")
    assert "no file gave an image with an object" in text and not (tmp_path / "cache" / "index.csv").exists()


def test_a_hostile_mask_in_the_cache_is_replaced_and_not_run(folder):
    (first, *_) = run(folder)
    path, trace = folder / "cache" / "masks" / f"{first.name}.pkl", folder / "ran"
    good = path.read_bytes()

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    path.write_bytes(pickle.dumps(Attack()))
    run(folder)
    assert path.read_bytes() == good and not trace.exists()


def test_the_input_is_no_place_for_the_cache(folder):
    before = files_of(folder / "train")
    assert "input and output are the same folder" in sentence("-i", folder / "train", "-o", folder / "train")
    assert files_of(folder / "train") == before


def test_a_cache_of_another_version_is_refused_and_left_alone(folder):
    run(folder)
    (folder / "cache" / "version.json").write_text('{"cache": 2}')
    before = files_of(folder / "cache")
    text = sentence("-i", folder / "train", "-o", folder / "cache")
    assert "a cache of version 2, but this code reads version 3; delete an old cache, and run first: python" in text
    assert files_of(folder / "cache") == before


def test_a_full_disk_stops_the_run_in_a_sentence_and_the_next_one_goes_on(folder, monkeypatch):
    real, written = writing.save_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) > 15:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_bytes", full)
        text = sentence("-i", folder / "train", "-o", folder / "cache", "--jobs", 1)
    assert "No space left on device" in text and "run the same command again, what is done is kept" in text
    done = times_of(folder / "cache")
    assert done and not list((folder / "cache").rglob("*.tmp")) and len(run(folder)) == 18
    journal = [json.loads(line)["name"] for line in (folder / "cache" / "done.jsonl").read_text().split("\n") if line]
    assert len(journal) == len(set(journal)) == 6


def test_arguments_that_do_not_fit_are_told(folder, capsys):
    for args, words in (
        ([], "one of the arguments -i/--input --smoke is required"),
        (["--masks", "a"], "one of the arguments -i/--input --smoke is required"),
        (["-i", "a", "--val-share", "0"], "--val-share"),
        (["-i", "a", "--jobs", "0"], "argument --jobs: invalid workers value: '0'"),
        (["-i", "a", "--jobs", "localhost"], "argument --jobs: invalid workers value: 'localhost'"),
    ):
        with pytest.raises(SystemExit):
            preprocess.main(args)
        assert words in capsys.readouterr().err
    for read, words in (
        ("modality=Photo", "--read modality=Photo: begin with a known one"),
        ("modality=US/../..", "--read modality=US/../..: begin with a known one"),
        ("window=liver", "window 'liver' is not known; give soft"),
        ("instances=maybe", "--read instances=maybe: give yes or no"),
        ("smallest=-1", "--read smallest=-1: give a whole number"),
        ("smallest=few", "--read smallest=few: give a whole number"),
        ("dataset=none", "--read dataset=none: no such data set; there are challenge, nuclei"),
        ("colour=red", "the keys are window, modality, dataset, instances, smallest"),
    ):
        assert words in sentence("-i", folder / "train", "-o", folder / "cache", "--read", read)
    assert "leave out yours" in sentence("-i", "a", "--masks", "b", "-o", folder / "cache", "--read", "dataset=btcv")
    assert "no such folder" in sentence("-i", folder / "none", "-o", folder / "cache")
    assert "no such file" in sentence("-i", folder / "train", "-o", folder / "cache", "--exclude", folder / "none")
    assert not (folder / "cache").exists()


def test_smoke_runs_as_a_command(tmp_path):
    command = [sys.executable, str(ROOT / "01_preprocess.py"), "--smoke", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("Next: python 02_train.py --smoke") and not list(tmp_path.iterdir())
    assert len(preprocess.main(["--smoke", "--jobs", "1", "-o", str(tmp_path / "kept")])) == 18
    assert len(fingerprint(tmp_path / "kept")) == 64
    with (tmp_path / "kept" / "index.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 18
