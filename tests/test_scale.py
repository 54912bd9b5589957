"""Step 1 on many cases: a stream that does not pile up, many machines, a run that is killed at any moment."""

import csv
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import load_entry
from demo_data import tiny_case
from formats import InputError, cache, usable_cores
from formats.cache import executor_of, in_parallel, read_index, write_index
from formats.case import Case
from formats.npz import load_npz
from formats.sources import instances_of, without_small
from formats.writing import one_run, save_npz

preprocess = importlib.import_module("01_preprocess")  # `import 01_preprocess` is a syntax error
cache_case = preprocess.cache_case
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

    class Jobs:
        def __len__(self):
            return 1000

        def __iter__(self):
            for i in range(1000):
                drawn.append(i)
                yield i

    results = in_parallel(abs, Jobs(), processes)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(drawn) <= processes * cache.AHEAD * cache.CHUNK + cache.CHUNK
    assert list(results) == list(range(3, 1000))


def test_jobs_follow_the_cores_that_the_process_may_use_and_windows_limit(monkeypatch):
    monkeypatch.setattr(preprocess, "run", lambda args: args.jobs)
    assert preprocess.main(["--smoke"]) == usable_cores()
    monkeypatch.setattr(cache, "ProcessPoolExecutor", FakePool)
    monkeypatch.setattr(cache.os, "name", "nt")
    with executor_of(500, 1000) as (_, count):
        assert count == 61
    with executor_of(500, 7) as (_, count):
        assert count == 7


class FakePool:
    """An executor that starts no process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def die(_):
    os._exit(9)


def test_a_process_that_is_killed_is_told_in_a_sentence():
    with pytest.raises(ChildProcessError, match="a process was killed; if memory is short, give fewer --jobs"):
        list(in_parallel(die, range(9), 2))


def fail_first(job):
    (path, i) = job
    if i == 0:
        raise OSError("disk full")
    time.sleep(0.02)
    (path / str(i)).touch()


def test_a_run_that_fails_does_not_finish_what_it_has_handed_out(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        list(in_parallel(fail_first, [(tmp_path, i) for i in range(99)], 2))
    assert len(list(tmp_path.iterdir())) < 2 * cache.AHEAD * cache.CHUNK - cache.CHUNK


# ---------------------------------------------------------------- many machines


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers, processes of their own in another folder. -> (address, workers)"""
    pytest.importorskip("distributed")
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "scheduler.json"
    setting = {
        "cwd": tmp_path / "elsewhere",
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
        "stderr": subprocess.DEVNULL,
    }
    dask, where = (
        [sys.executable, "-m", "dask"],
        ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)],
    )
    processes = [subprocess.Popen([*dask, "scheduler", "--port", "0", *where], **setting)]
    limit = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    worker = [*dask, "worker", "--nworkers", "1", "--nthreads", "1", "--no-nanny", *where]
    processes += [subprocess.Popen(worker, **setting) for _ in range(2)]
    address = json.loads(file.read_text())["address"]
    from distributed import Client

    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield address, processes[1:]
    for process in processes:
        process.kill()
        process.wait(timeout=60)


def test_a_cluster_that_loses_a_worker_makes_the_cache_of_one_machine(tmp_path, cluster, monkeypatch):
    address, workers = cluster
    monkeypatch.chdir(tmp_path)  # paths are relative to the folder of the main process
    write_cases(Path("train"), 60, 20)
    run("-i", "train", "-o", "one", "--jobs", 2)
    lines = []

    def kill_one():
        limit = time.monotonic() + 60
        while lines_of(Path("all")) < 10 and time.monotonic() < limit:
            time.sleep(0.001)
        workers[0].kill()
        lines.append(lines_of(Path("all")))

    killer = threading.Thread(target=kill_one)
    killer.start()
    entries = run("-i", "train", "-o", "all", "--jobs", address)
    killer.join()
    assert 10 <= lines[0] < 80 and workers[0].wait(timeout=60) and workers[1].poll() is None
    assert Path("all/index.csv").read_bytes() == Path("one/index.csv").read_bytes()
    assert lines_of(Path("all")) == 80  # one line a case
    times = [path.stat().st_mtime_ns for path in sorted(Path("all/imgs").glob("*.png"))]
    assert run("-i", "train", "-o", "all", "--jobs", address) == entries  # and it resumes
    assert times == [path.stat().st_mtime_ns for path in sorted(Path("all/imgs").iterdir())]
    assert content(Path("all")) == content(Path("one"))  # the killed worker's half a file is gone too
    monkeypatch.setattr(cache, "__name__", "not_there")
    assert "No module named 'not_there' there; run there, in this folder: pip install -e ." in sentence(
        "-i", "train", "-o", "all", "--jobs", address
    )


def test_without_dask_or_scheduler_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    write_cases(tmp_path / "train", 2, 0)
    arguments = ("-i", tmp_path / "train", "-o", tmp_path / "all", "--jobs", "tcp://127.0.0.1:9")
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert "tcp://127.0.0.1:9" in (text := sentence(*arguments)) and "run the same command again" in text
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install -r requirements-cluster.txt" in sentence(*arguments)


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


def test_of_two_runs_on_one_cache_the_second_is_refused_and_the_index_is_one_runs(tmp_path):
    write_cases(tmp_path / "first", 300, 0)
    write_cases(tmp_path / "second", 4, 1)
    process, limit = start(tmp_path / "first", tmp_path / "cache"), time.monotonic() + 60
    while lines_of(tmp_path / "cache") < 8 and time.monotonic() < limit:
        time.sleep(0.001)
    with pytest.raises(SystemExit, match=f"process {process.pid} of .* is writing here"):
        run("-i", tmp_path / "second", "-o", tmp_path / "cache")
    assert process.wait(timeout=120) == 0
    found = {Path(entry.source).name for entry in read_index(tmp_path / "cache")}
    assert found == {path.name for path in (tmp_path / "first").iterdir()}
    assert not (tmp_path / "cache" / ".lock").exists()


def test_a_run_removes_what_a_killed_one_left(tmp_path):
    for place in ("", "imgs", "masks", "cases/imgs", "cases/gts"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name in ("US_1.png.0123abcd.tmp", "US_1.png"):
            (tmp_path / place / name).write_bytes(b"half")
    with pytest.raises(InputError, match="nothing to train on"), one_run(tmp_path, *cache.FOLDERS):
        cache.cache_sources(tmp_path, [], 1, set(), cache_case, load_entry)
    assert {path.name for path in tmp_path.rglob("*.*") if path.is_file()} == {"US_1.png", "done.jsonl"}


def test_the_page_shows_the_plan_that_was_computed_from_the_measured_rate():
    plan = (ROOT / "results" / "cache_speed" / "plan.md").read_text(encoding="utf-8")
    one_machine = plan[: plan.index("| 16 x 16")]
    assert one_machine in (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")


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
    three, time_2 = found("--read", "instances=yes")
    two, time_3 = found("--read", "instances=yes", "smallest=5")
    again, time_4 = found("--read", "instances=yes", "smallest=5")
    assert (one, three, two, again) == (1, 3, 2, 2) and time_1 < time_2 < time_3 == time_4
    assert "1 objects below the smallest size" in capsys.readouterr().out
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
    assert json.loads((tmp_path / "version.json").read_text()) == {"cache": 3}


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
    entries = run(*arguments, "--read", "window=lung")
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
    assert len(run(*arguments, "--read", "window=lung")) == 4
    assert (
        sum(
            a != b
            for a, b in zip(
                times, [p.stat().st_mtime_ns for p in sorted((tmp_path / "cache" / "imgs").iterdir())], strict=True
            )
        )
        == 1
    )
    assert "WIDTH/LEVEL" in sentence(*arguments, "--read", "window=no")
