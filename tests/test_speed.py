"""benchmarks/speed.py: the paper's cases, the published algorithm, runs that take turns.

Most runs use stand-ins; the last test starts whole processes.
"""

import csv
import json
import math
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import speed
import torch
from fake_model import BrightModel
from speed import (
    BY_NAME,
    INSIDE,
    RELEASED,
    SECONDS_A_SLICE,
    SIX_OBJECTS,
    STAGES,
    TABLE5,
    TINY,
    case_table,
    draw,
    medians,
    spans,
)

import segment
from formats import InputError
from formats.case import Case
from formats.npz import load_npz, read_npz, write_case
from grid import boxes_from_labels
from model import TorchEngine
from presets import PRESETS
from segment import Segmenter
from volumes import segment_case

PAPER = """
3DBox_CT_0566 287 512 512 6 210.98 51.85
3DBox_CT_0888 237 512 512 6 53.35 11.22
3DBox_CT_0860 246 512 512 1 7.50 2.51
3DBox_MR_0621 115 400 400 6 83.16 16.92
3DBox_MR_0121 64 290 320 6 51.20 9.84
3DBox_MR_0179 84 512 512 1 6.92 1.6
3DBox_PET_0001 264 200 200 1 3.50 0.78
2DBox_US_0525 256 256 3 1 0.40 0.11
2DBox_X-Ray_0053 320 640 3 34 0.90 0.72
2DBox_Dermoscopy_0003 3024 4032 3 1 1.41 2.09
2DBox_Endoscopy_0086 480 560 3 1 0.43 0.09
2DBox_Fundus_0003 2048 2048 3 1 0.72 0.38
2DBox_Microscope_0008 1536 2040 3 19 1.05 0.66
2DBox_Microscope_0016 1920 2560 3 241 6.27 6.19
"""
OURS = "fixed proposed torch"
OPENVINO = "fixed proposed openvino"


def boxed(name, seed=0):
    case = draw(BY_NAME[name], seed)
    return replace(case, boxes=boxes_from_labels(case.labels)[1])


# ---------------------------------------------------------------- the cases


def test_sizes_objects_and_seconds_are_those_of_the_paper():
    lines = [line.split() for line in PAPER.split("\n") if line]
    ours = [[c.name, *map(str, c.shape), str(c.objects), c.paper_baseline_s, c.paper_proposed_s] for c in TABLE5]
    assert [line[:5] + [float(word) for word in line[5:]] for line in lines] == ours


@pytest.mark.parametrize("case", [c for c in (*TABLE5, *TINY) if not c.is_3d or c.shape[0] < 100], ids=lambda c: c.name)
def test_a_drawn_case_has_its_size_its_objects_and_room_between_them(case):
    phantom = draw(case)
    assert phantom.image.shape == case.shape and phantom.image.dtype == np.uint8
    ids, boxes = boxes_from_labels(phantom.labels)
    assert ids.tolist() == list(range(1, case.objects + 1))
    ndim = phantom.labels.ndim
    planar = [0, 1, ndim, ndim + 1]
    for i, a in enumerate(boxes[:, planar]):  # in cells of their own, so no object covers another
        for b in boxes[i + 1 :, planar]:
            assert (a[2:] < b[:2]).any() or (b[2:] < a[:2]).any()
    if ndim == 2:
        gray = bool((phantom.image[..., :1] == phantom.image).all())
        assert gray == any(word in case.name for word in ("US", "X-Ray"))
    again = draw(case)
    assert np.array_equal(again.image, phantom.image) and np.array_equal(again.labels, phantom.labels)
    assert not np.array_equal(draw(case, 1).image, phantom.image)


@pytest.mark.parametrize("case", [c for c in TABLE5 if c.is_3d], ids=lambda c: c.name)
def test_objects_span_as_many_slices_as_the_paper_has_seconds_for(case):
    found = spans(case, np.random.default_rng(0))
    assert all(0 <= first < last < case.shape[0] for first, last in found)
    visited = sum(last - first - 1 for first, last in found)  # the released loop leaves both ends out
    assert visited * SECONDS_A_SLICE == pytest.approx(case.paper_baseline_s, abs=2)


def test_the_drawn_spans_are_the_boxes_and_six_objects_are_in_every_slice():
    case = BY_NAME["3DBox_MR_0121"]
    found = spans(case, np.random.default_rng((0, list(BY_NAME).index(case.name))))
    assert boxed(case.name).boxes[:, [2, 5]].astype(int).tolist() == found.tolist()
    assert spans(SIX_OBJECTS, np.random.default_rng(0)).tolist() == [[0, 23]] * 6


def test_a_drawn_case_survives_its_file(tmp_path):
    case = read_npz(write_case(tmp_path, draw(TINY[1])))
    assert case.is_3d and np.array_equal(case.boxes, boxed(TINY[1].name).boxes)


# ---------------------------------------------------------------- the published algorithm


def released_algorithm(segmenter, case):
    with speed.published_work():
        return segment_case(segmenter, case)


class NoiseModel:
    """Smooth random logits on both sides of 0, other ones for each image and box."""

    kinds = ("exact",)

    def encode(self, image):
        return image

    def decode(self, embedding, boxes, within=None, boxes_are="exact"):
        seeds = [[int(1e3 * embedding.sum()), *(8 * box).astype(int)] for box in boxes]
        coarse = [np.random.default_rng(seed).normal(size=(9, 9)).astype(np.float32) for seed in seeds]
        return np.stack([cv2.resize(one, (256, 256)) for one in coarse]), np.ones(len(boxes), np.float32)


NETWORKS = {
    "bright": lambda: BrightModel(0.45),
    "noise": NoiseModel,
    "random": lambda: TorchEngine(segment.build("proposed")),
}


@pytest.mark.parametrize("name", [case.name for case in TINY])
@pytest.mark.parametrize("network", ["bright", "noise", pytest.param("random", marks=pytest.mark.long)])
def test_the_released_algorithm_paints_what_the_released_preset_paints(name, network):
    torch.manual_seed(0)
    segmenter = Segmenter(NETWORKS[network](), PRESETS["released"], enhanced=True)
    case = boxed(name)
    wanted = segment_case(segmenter, case)
    assert wanted.any()
    assert np.array_equal(released_algorithm(segmenter, case), wanted)


def test_the_released_algorithm_follows_objects_that_cover_each_other():
    labels = np.zeros((9, 70, 90), np.uint16)
    labels[1:8, 20:40, 20:50], labels[2:9, 30:60, 40:80] = 1, 2
    boxes = np.array([[20.0, 20, 1, 49, 39, 7], [40, 30, 2, 79, 59, 8], [35, 25, 0, 60, 50, 4]])
    case = Case("3DBox_CT_overlap", np.where(labels > 0, 200, 10).astype(np.uint8), boxes, None, None, True)
    segmenter = Segmenter(BrightModel(), PRESETS["released"], enhanced=False)
    wanted = segment_case(segmenter, case)
    assert set(np.unique(wanted)) == {0, 1, 2, 3}
    assert np.array_equal(released_algorithm(segmenter, case), wanted)


def test_the_process_of_the_published_algorithm_is_step_4_with_its_work(tmp_path, monkeypatch):
    models = []

    def load(*_, **__):
        models.append(BrightModel(0.45))
        return Segmenter(models[-1], PRESETS["released"], enhanced=True)

    monkeypatch.setattr(segment, "load", load)
    path = write_case(tmp_path, draw(TINY[1]))
    speed.released_step(["-i", str(path.parent), "-o", str(tmp_path / "out")])
    wanted = segment_case(Segmenter(BrightModel(0.45), PRESETS["released"], enhanced=True), read_npz(path))
    assert np.array_equal(load_npz(tmp_path / "out" / f"{TINY[1].name}.npz")["segs"], wanted)
    assert models[0].encoded == models[0].decoded > 2, "each slice anew for each of the two objects"
    with (tmp_path / "out" / "efficiency.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    stages = [float(row[f"{stage}_s"]) for stage in INSIDE if stage != "other"]
    assert 0 < sum(stages) <= float(row["total_s"]) + 1e-3


# ---------------------------------------------------------------- a run


def made_up(case, system, repeat=1, seconds=2.0):
    """A row as `measure` has it, half a second each for start, load and exit."""
    row = {"case": case, "system": system, "repeat": repeat, "seconds": seconds, "process_s": seconds + 1.5}
    row |= {f"{stage}_s": seconds * (stage == "encode") for stage in INSIDE} | {"peak_mb": 500.0}
    return row | {"start_s": 0.5, "load_s": 0.5, "exit_s": 0.5}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Runs that take no time; `asked` lists them, `fails` the systems that go wrong."""
    asked, fails = [], set()

    def measure(case, system):
        asked.append((case, system))
        if system in fails:
            raise InputError(f"{case}, {system}: openvino is not installed")
        row = made_up(case, system)
        return {key: value for key, value in row.items() if key not in speed.NAMES}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "OURS", (OURS, OPENVINO))
    monkeypatch.setattr(speed, "SYSTEMS", (RELEASED, OURS, OPENVINO))
    monkeypatch.chdir(tmp_path)
    return tmp_path, asked, fails


def test_systems_take_turns_and_what_fails_is_told(place, capsys):
    folder, asked, fails = place
    rows = speed.main(["--cases", "2DBox_US_0525", SIX_OBJECTS.name, "--repeats", "2"])
    turn = [RELEASED, OURS, OPENVINO]
    # the first two make graphs and fill the disk's cache
    assert {case for case, _ in asked[:2]} == {TINY[0].name} and [s for _, s in asked[2:]] == 4 * turn
    assert [row["system"] for row in rows] == 4 * turn
    assert json.loads((folder / "results/speed/settings.json").read_text())["cores"] > 0
    assert "## 2DBox_US_0525: 256 x 256 x 3, 1 object\n" in (folder / "results/speed/table.md").read_text()
    with (folder / "results/speed/times.csv").open(newline="") as file:
        assert [row["system"] for row in csv.DictReader(file)] == 4 * turn
    fails.add(OPENVINO)
    assert len(speed.main(["--cases", "2DBox_US_0525", "--repeats", "1", "-o", "elsewhere"])) == 2
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told == ["speed.py: left out: 2DBox_US_0525, fixed proposed openvino: openvino is not installed"]
    fails.update(turn)
    with pytest.raises(SystemExit, match="^speed.py: no run went well, see above$"):
        speed.main(["--cases", "2DBox_US_0525"])
    for more in (["--repeats", "0"], ["--cases", "3DBox_CT_1"]):
        with pytest.raises(SystemExit):
            speed.main(more)


def test_the_table_has_medians_and_ratios():
    case = BY_NAME["2DBox_US_0525"]
    of = {RELEASED: (9, 6, 7), OURS: (4, 2.5, 2), "fixed proposed openvino": (1.0, 0.5, 0.5)}
    rows = [
        made_up(case.name, system, repeat, seconds)
        for system, runs in of.items()
        for repeat, seconds in enumerate(runs, start=1)
    ]
    assert medians(rows, case.name)[RELEASED]["seconds"] == 7
    lines = case_table(rows, case).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["paper baseline, on its machine"][:2] == ["0.4", "-"]
    assert cells[OURS][:4] == ["2.5", "2.8", "4", "1"]  # seconds, released / this, start to exit, torch / this
    assert cells["fixed proposed openvino"][:4] == ["0.5", "14", "2", "2"]
    shown = dict(zip(lines[2].split("|")[2:-1], cells[OURS], strict=True))
    assert shown[" load, s "] == "0.5" and shown[" encode, s "] == "2.5" and shown[" peak MB "] == "500"
    assert len(cells[OURS]) == 4 + len(STAGES) + 1


@pytest.mark.long  # whole processes of step 4, with PyTorch
def test_real_processes_are_timed_by_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "WORK", tmp_path / "work")
    monkeypatch.setattr(speed, "OURS", (OURS,))
    monkeypatch.setattr(speed, "SYSTEMS", (RELEASED, OURS))
    rows = speed.main(["--cases", TINY[0].name, "--repeats", "1", "-o", str(tmp_path / "out")])
    assert [row["system"] for row in rows] == [RELEASED, OURS]
    for row in rows:
        assert sum(row[f"{stage}_s"] for stage in STAGES) == pytest.approx(row["process_s"], abs=0.05)
        assert row["encode_s"] > 0 and row["start_s"] > 0 and row["load_s"] > 0
        assert row["peak_mb"] > 100 or sys.platform != "linux" and math.isnan(row["peak_mb"])
    assert np.load(tmp_path / "work" / "segs" / OURS / f"{TINY[0].name}.npz")["segs"].any()
    monkeypatch.setattr(speed, "CHILD", "raise SystemExit('it went wrong')")
    with pytest.raises(InputError, match="2DBox_US_tiny, fixed proposed torch: it went wrong"):
        speed.measure(TINY[0].name, OURS)
