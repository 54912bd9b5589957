"""Step 1 on many cases: a stream that doesn't pile up, shards that make one cache, a run that is killed at any moment."""

import csv
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import CacheEntry, cache_case, load_entry, read_index, write_index
from files import InputError, journal
from files.case import Case
from files.journal import in_parallel, names_of_others, remove_leftovers
from files.npz import load_npz
from files.objects import instances_of, without_small
from files.sources import parse_shard, shard_of
from files.writing import save_npz
from phantoms import tiny_case

preprocess = importlib.import_module("01_preprocess")  # `import 01_preprocess` is a syntax error
ROOT = Path(__file__).parent.parent


def write_cases(folder, pictures=24, volumes=4):
    """Training files of two modalities."""
    for seed in range(pictures + volumes):
        case = tiny_case(seed, 2 if seed < pictures else 3)
        spacing = {"spacing": np.array([1.0, 1.0, 3.0])} if case.is_3d else {}
        save_npz(folder / f"{case.name}.npz", imgs=case.image, gts=case.labels, **spacing)
    return folder


def run(*args):
    return preprocess.main([*map(str, args)])


def content(cache):
    """Everything in a cache but who did it: {path: bytes}."""
    mine = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.suffix not in (".jsonl", ".json")]
    return {str(path.relative_to(cache)): path.read_bytes() for path in mine}


def sentence(*args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# ---------------------------------------------------------------- a stream


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_drawn_as_they_are_needed_and_results_keep_their_order(processes):
    drawn = []

    def jobs():
        for i in range(1000):
            drawn.append(i)
            yield i

    results = in_parallel(abs, jobs(), 1000, processes, "jobs")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(drawn) <= processes * journal.AHEAD * journal.CHUNK + journal.CHUNK
    assert list(results) == list(range(3, 1000))


def test_only_names_like_slices_can_be_claimed_twice():
    entry = CacheEntry("CT_v-002", "CT", "CT", "CT_v", "CT_v.npz", 9, 9, "", 1)
    known = {"CT_v": journal.CachedCase("CT_v", "", [entry], 1, 0, 0)}
    assert names_of_others({"CT_v", "US_1", "CT_v-002"}, known) == {"CT_v-002": {"CT_v-002"}}
    assert names_of_others({"CT_w", "CT_w-003"}, known) == {"CT_w": {"CT_w-003"}}
    assert names_of_others({"US_1", "US_2"}, known) == {}


# ---------------------------------------------------------------- shards


def test_a_case_keeps_its_shard_when_files_join_and_a_person_is_on_one():
    names = [f"US_set_{i}" for i in range(4000)]
    shards = [shard_of(name, 16) for name in names]
    counts = np.bincount(shards, minlength=17)[1:]
    assert counts.sum() == 4000 and counts.min() > 180 and counts.max() < 320
    assert len({shard_of(f"{kind}_STS_STS-031-{z:03d}", 16) for kind in ("CT", "PET") for z in range(50)}) == 1


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_make_the_cache_of_one_run_and_the_last_writes_the_index(order, tmp_path, capsys):
    train = write_cases(tmp_path / "train")
    run("-i", train, "-o", tmp_path / "one", "--jobs", 1)
    for k in order[:2]:
        assert run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", f"{k}/3") == []
        assert not (tmp_path / "all" / "index.csv").exists()
    assert f"no index yet, shards [{order[2]}] have not ended" in capsys.readouterr().out
    entries = run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", f"{order[2]}/3")
    assert entries == read_index(tmp_path / "one") and len({shard_of(e.name, 3) for e in entries}) == 3
    assert content(tmp_path / "all") == content(tmp_path / "one")


def test_shards_at_one_time_make_the_cache_of_one_run(tmp_path):
    train = write_cases(tmp_path / "train")
    run("-i", train, "-o", tmp_path / "one", "--jobs", 1)
    command = [
        sys.executable,
        str(ROOT / "01_preprocess.py"),
        "-i",
        str(train),
        "-o",
        str(tmp_path / "all"),
        "--jobs",
        "1",
    ]
    together = [subprocess.Popen([*command, "--shard", f"{k}/3"], stderr=subprocess.PIPE) for k in (1, 2, 3)]
    for process in together:
        assert process.communicate(timeout=120)[1] == b"" and process.returncode == 0
    assert content(tmp_path / "all") == content(tmp_path / "one")


def test_a_plain_run_completes_what_shards_began_and_later_shards_join(tmp_path):
    train = write_cases(tmp_path / "train")
    run("-i", train, "-o", tmp_path / "one", "--jobs", 1)
    run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", "2/3")
    run("-i", train, "-o", tmp_path / "all", "--jobs", 1)
    assert content(tmp_path / "all") == content(tmp_path / "one")
    before = read_index(tmp_path / "all")
    write_cases(train, 40, 0)  # more files: four volumes' places are taken by pictures
    for k in (1, 2, 3):
        run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", f"{k}/3")
    after = read_index(tmp_path / "all")
    assert {e.name: e for e in before}.items() <= {e.name: e for e in after}.items() and len(after) == len(before) + 16


def test_shards_with_other_options_and_wrong_shards_are_told(tmp_path):
    train = write_cases(tmp_path / "train", 8, 0)
    run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", "1/2")
    text = sentence("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", "2/2", "--smallest", 9)
    assert "were cached with other options than this shard's" in text and not (tmp_path / "all" / "index.csv").exists()
    for bad in ("0/3", "4/3", "3", "a/b", "1/"):
        with pytest.raises(InputError, match="such as 3/16"):
            parse_shard(bad)


def test_bad_files_of_a_shard_are_told_and_the_others_make_an_index(tmp_path, capsys):
    train = write_cases(tmp_path / "train", 8, 0)
    (train / "US_bad_1.npz").write_bytes(b"no")
    bad = shard_of("US_bad_1", 2)
    text = sentence("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", f"{bad}/2")
    assert "1 left out as told above" in text
    assert len(run("-i", train, "-o", tmp_path / "all", "--jobs", 1, "--shard", f"{3 - bad}/2")) == 8


# ---------------------------------------------------------------- killed


def start(train, cache, jobs=2):
    command = [sys.executable, str(ROOT / "01_preprocess.py"), "-i", str(train), "-o", str(cache), "--jobs", str(jobs)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines_of(cache):
    path = cache / "done.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    rng, draw = np.random.default_rng(0), random.Random(0)
    for i in range(60):  # large and uncompressed: reading takes a while, so that the kill falls into the work
        image, labels = rng.integers(0, 256, (1200, 1200), np.uint8), np.zeros((1200, 1200), np.uint8)
        labels[100 + i : 600, 200:900], labels[700:1100, 300 : 400 + i] = 1, 2
        (tmp_path / "train").mkdir(exist_ok=True)
        np.savez(tmp_path / "train" / f"{('US', 'CT')[i % 2]}_set_{i:02d}.npz", imgs=image, gts=labels)
    run("-i", tmp_path / "train", "-o", tmp_path / "whole", "--jobs", 2)
    cache, killed = tmp_path / "cache", 0
    for wanted in (1, 15, 30, 50):
        process, limit = start(tmp_path / "train", cache), time.monotonic() + 60
        while lines_of(cache) < wanted and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(draw.random() / 20)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)  # the main process and its workers
        process.wait(timeout=60)
    assert killed >= 2 and not (cache / "index.csv").exists()
    (cache / "imgs" / "US_set_00.png.0123abcd.tmp").write_bytes(b"half")  # what a kill between two bytes leaves
    assert len(run("-i", tmp_path / "train", "-o", cache, "--jobs", 2)) == 60
    assert content(cache) == content(tmp_path / "whole")
    for name in ("index.csv", "version.json"):
        assert (cache / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_end_when_the_main_process_alone_is_killed(tmp_path):
    write_cases(tmp_path / "train", 400, 0)

    def workers(group):
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(") ")[2].split()  # state, parent, group, ...
            except OSError:
                continue
            if fields[2] == str(group) and fields[0] != "Z":
                found.append(path)
        return found

    process, limit = start(tmp_path / "train", tmp_path / "cache"), time.monotonic() + 60
    while lines_of(tmp_path / "cache") < 8 and time.monotonic() < limit:
        time.sleep(0.001)
    assert len(workers(process.pid)) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    while workers(process.pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert workers(process.pid) == []


def test_a_shard_removes_only_its_own_leftovers(tmp_path):
    mine, others = (
        ["US_1.png.0123abcd.tmp", "CT_v-003.pkl.0123abcd.tmp"],
        ["US_2.png.0123abcd.tmp", "CT_w-003.pkl.ff.tmp"],
    )
    (tmp_path / "imgs").mkdir()
    for name in (*mine, *others, "US_1.png"):
        (tmp_path / "imgs" / name).write_bytes(b"half")
    assert remove_leftovers(tmp_path, {"US_1", "CT_v"}) == 2
    assert {path.name for path in (tmp_path / "imgs").iterdir()} == {*others, "US_1.png"}
    assert remove_leftovers(tmp_path) == 2 and [path.name for path in (tmp_path / "imgs").iterdir()] == ["US_1.png"]


def test_the_page_shows_the_plan_that_was_measured():
    plan = (ROOT / "results" / "cache_speed" / "plan.md").read_text(encoding="utf-8")
    assert plan in (ROOT / "docs" / "cache.md").read_text(encoding="utf-8"), "paste results/cache_speed/plan.md there"


# ---------------------------------------------------------------- which labels become objects


def test_parts_that_touch_at_a_corner_are_one_object_in_2d_and_3d():
    labels = np.zeros((2, 4, 6), np.uint16)
    labels[0, 0, 0] = labels[1, 1, 1] = 7  # one corner in common, on two slices
    labels[0, 0, 3] = labels[0, 1, 4] = 7
    labels[1, 3, 5] = 9
    parts = instances_of(labels)
    assert parts[0, 0, 0] == parts[1, 1, 1] == 1 and parts[0, 0, 3] == parts[0, 1, 4] == 2 and parts[1, 3, 5] == 3
    assert parts.dtype == np.uint16 and np.array_equal(parts > 0, labels > 0)
    assert not instances_of(np.zeros((3, 3), np.uint16)).any()
    checks = np.kron(np.indices((400, 400)).sum(0) % 2, [[1, 0], [0, 0]]).astype(np.uint16)
    with pytest.raises(ValueError, match="80000 connected parts"):
        instances_of(checks)


def test_objects_below_the_smallest_are_counted_and_dropped_by_all_their_pixels():
    labels = np.zeros((2, 3, 4), np.uint16)
    labels[0, 0, :2] = labels[1, 0, :2] = 300  # 4 voxels on two slices
    labels[1, 2, 1:] = 5
    kept, dropped = without_small(labels, 4)
    assert dropped == 1 and np.array_equal(kept, labels * (labels == 300))
    assert without_small(labels, 3)[1] == 0 and without_small(labels, 5)[1] == 2


def test_smallest_and_instances_redo_the_cases_and_are_counted(tmp_path, capsys):
    labels = np.zeros((64, 64), np.uint8)
    labels[2:10, 2:10], labels[20:50, 20:50], labels[60:62, 60:62] = 1, 1, 1  # 64, 900 and 4 pixels
    save_npz(tmp_path / "train" / "US_a_1.npz", imgs=np.full((64, 64), 9, np.uint8), gts=labels)
    arguments = ("-i", tmp_path / "train", "-o", tmp_path / "cache", "--jobs", 1)

    def found(*more):
        (entry,) = run(*arguments, *more)
        cached = load_entry(tmp_path / "cache", entry)[1]
        assert len(np.unique(cached)) - 1 == entry.objects
        return entry.objects, (tmp_path / "cache" / "masks" / "US_a_1.pkl").stat().st_mtime_ns

    one, time_1 = found()
    three, time_2 = found("--instances")
    two, time_3 = found("--instances", "--smallest", 5)
    again, time_4 = found("--instances", "--smallest", 5)
    assert (one, three, two, again) == (1, 3, 2, 2) and time_1 < time_2 < time_3 == time_4
    assert "1 objects below --smallest" in capsys.readouterr().out
    assert found()[0] == 1


# ---------------------------------------------------------------- the index


def test_the_index_tells_range_and_window_and_8_bit_input_leaves_them_blank(tmp_path):
    measured = (np.float32(-1024.0), np.float32(3071.5))
    case = replace(tiny_case(), name="CT_a_1", window=(400.0, 40.0), source_range=measured)
    (entry,) = cache_case(tmp_path, case, "CT_a_1.nii.gz").entries
    assert (entry.low, entry.high, entry.window) == (-1024.0, 3071.5, "400/40")
    (plain,) = cache_case(tmp_path, tiny_case(), "b.npz").entries
    assert (plain.low, plain.high, plain.window) == (None, None, "")
    write_index(tmp_path, [replace(entry, split="train"), replace(plain, split="val")])
    assert {e.name: (e.low, e.high, e.window) for e in read_index(tmp_path)} == {
        "CT_a_1": (-1024.0, 3071.5, "400/40"), "2DBox_US_tiny0": (None, None, ""),
    }  # fmt: skip
    with (tmp_path / "index.csv").open(newline="") as file:
        assert [row["low"] for row in csv.DictReader(file)] == ["", "-1024.0"]
    assert json.loads((tmp_path / "version.json").read_text()) == {"cache": 2}


def test_images_that_are_not_8_bit_never_reach_the_grid(tmp_path):
    case = tiny_case()
    for image, labels in ((case.image.astype(np.uint16), case.labels), (case.image, case.labels.astype(np.int32))):
        with pytest.raises(AssertionError):
            cache_case(tmp_path, Case("US_a", image, None, labels, None, False), "a")


def test_a_window_redoes_the_cases_stands_in_the_index_and_spares_validation_cases(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    write_cases(tmp_path / "val", 1, 0)
    (tmp_path / "train").mkdir()
    for number in (1, 2):
        volume = np.random.default_rng(number).integers(-1000, 1500, (40, 30, 4)).astype(np.int16)
        volume[0, 0, 0], volume[1, 0, 0] = -1024, 2000
        labels = np.zeros_like(volume)
        labels[5:20, 5:20, 1:3] = 1
        for name, array in ((f"CT_a_{number}", volume), (f"CT_a_{number}_mask", labels)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "train" / f"{name}.nii.gz")
    arguments = ("-i", tmp_path / "train", "--val", tmp_path / "val", "-o", tmp_path / "cache", "--jobs", 1)
    soft = [load_entry(tmp_path / "cache", entry)[0] for entry in run(*arguments)]
    entries = run(*arguments, "--window", "lung")
    lung = [load_entry(tmp_path / "cache", entry)[0] for entry in entries]
    assert {(e.low, e.high, e.window) for e in entries if e.modality == "CT"} == {(-1024.0, 2000.0, "1500/-600")}
    assert [e.split for e in entries if e.window == ""] == ["val"] and len(entries) == 5
    assert sum(not np.array_equal(a, b) for a, b in zip(soft, lung, strict=True)) == 4
    stored = load_npz(tmp_path / "cache" / "cases" / "imgs" / "2DBox_US_tiny0.npz")["imgs"]
    assert np.array_equal(stored, tiny_case().image)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache" / "imgs").iterdir())]
    labels[:] = 0
    labels[8:30, 8:20, 2] = 2  # a mask beside the image has changed
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "train" / "CT_a_2_mask.nii.gz")
    assert len(run(*arguments, "--window", "lung")) == 4
    assert (
        sum(
            a != b
            for a, b in zip(
                times, [p.stat().st_mtime_ns for p in sorted((tmp_path / "cache" / "imgs").iterdir())], strict=True
            )
        )
        == 1
    )
    assert "WIDTH/LEVEL" in sentence(*arguments, "--window", "no")
