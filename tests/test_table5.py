"""benchmarks/table5.py: the paper's cases, the published algorithm's work, scaling, a run that goes on where it stopped.

Most runs use the stand-in of fake_model.py; the last tests are the real thing.
"""

import csv
import json
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import table5
import table5_work
import torch
from fake_model import BrightModel
from table5 import BASELINE, OURS, RELEASED, Times, append_row, parts_text, read_times, times_text
from table5_work import (
    BY_NAME,
    ORGANS,
    SECONDS_A_SLICE,
    SIX_OBJECTS,
    STAGES,
    TABLE5,
    TINY,
    draw,
    object_slices,
    organ_pair,
    package_nsd,
    released_algorithm,
    scaled,
    spans,
    thinner,
    work,
)

import segment
from files import InputError
from files.case import Case
from files.npz import read_npz, write_case
from files.writing import save_json
from grid import boxes_from_labels
from metrics import nsd
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
        assert gray != case.color
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
    assert boxed(case.name).boxes[:, [2, 5]].astype(int).tolist() == [list(pair) for pair in found]
    assert spans(SIX_OBJECTS, np.random.default_rng(0)) == [(0, 23)] * 6


# ---------------------------------------------------------------- the published algorithm


class NoiseModel:
    """Smooth random logits on both sides of 0, other ones for each image and box."""

    def encode(self, image):
        return image

    def decode(self, embedding, boxes, within=None):
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


def test_the_released_algorithm_runs_the_network_as_written_and_ours_the_fast_one(monkeypatch):
    monkeypatch.setattr("fast.torch_engine.fast_engine", lambda network: ("fast", network))  # its checks take long
    plain, fast = (table5_work.segmenter_of(*system.split()).engine for system in (RELEASED, OURS))
    assert type(plain) is TorchEngine and fast[0] == "fast"
    assert any(name.endswith("running_mean") for name in plain.network.state_dict()), "batch norms and all"
    assert BASELINE.split()[-1] == RELEASED.split()[-1] == "torch"


def test_the_released_algorithm_follows_objects_that_cover_each_other():
    labels = np.zeros((9, 70, 90), np.uint16)
    labels[1:8, 20:40, 20:50], labels[2:9, 30:60, 40:80] = 1, 2
    boxes = np.array([[20.0, 20, 1, 49, 39, 7], [40, 30, 2, 79, 59, 8], [35, 25, 0, 60, 50, 4]])
    case = Case("3DBox_CT_overlap", np.where(labels > 0, 200, 10).astype(np.uint8), boxes, None, None, True)
    segmenter = Segmenter(BrightModel(), PRESETS["released"], enhanced=False)
    wanted = segment_case(segmenter, case)
    assert set(np.unique(wanted)) == {0, 1, 2, 3}
    assert np.array_equal(released_algorithm(segmenter, case), wanted)


@pytest.mark.parametrize("name", [TINY[0].name, TINY[1].name, "3DBox_MR_0121"])
@pytest.mark.parametrize("preset", ["released", "fixed"])
def test_work_is_what_the_network_is_asked_for(name, preset):
    case, model = boxed(name), BrightModel()
    segmenter = Segmenter(model, PRESETS[preset], enhanced=False)
    if preset == "released":
        case = replace(case, boxes=thinner(case.boxes, 6) if case.is_3d else case.boxes)
        released_algorithm(segmenter, case)
        assert (model.encoded == model.decoded) == case.is_3d  # once a slice and object, once an image
    else:
        segment_case(segmenter, case)
    encoded, decoded, cells = work(case, PRESETS[preset], shared=preset == "fixed")
    assert (model.encoded, model.decoded) == (encoded, decoded)
    assert cells == 4096 * decoded if preset == "released" else decoded <= cells < 4096 * decoded


def test_the_fast_decoders_multiply_adds_by_hand():
    found = table5.fast_decoder_macs()
    one_projection = 4096 * 256 * 128
    assert found["fast image"] == 6 * one_projection
    assert found["fast cell"] == 256 * 256 + 4 * 64 * 128  # to 2x2 pixels of 64 channels, each to 2x2 of 32
    # of all cells and 56 rows of 256: write twice; of 16 rows at the end: read and sum; of 56 rows of 56: read twice, sum once;
    # by head 56 rows of 16 eight times (keys, values, queries; image and place of two readings; values), 16 rows of 16 once
    by_hand = 4096 * (256 * (2 * 56 + 2 * 16) + 3 * 56 * 56 + 16 * (8 * 56 + 16))
    assert by_hand < found["fast box"] < 1.2 * by_hand  # the rest is the tokens' own


# ---------------------------------------------------------------- parts of volumes


def test_thinner_objects_keep_their_place_and_overlap_and_fit_the_limit():
    boxes = boxed("3DBox_MR_0121").boxes
    whole = object_slices(boxes)
    assert thinner(boxes, whole) is boxes
    for limit in (3, 8, 12, 20):
        thin = thinner(boxes, limit)
        assert object_slices(thin) <= limit and np.array_equal(thin[:, [0, 1, 3, 4]], boxes[:, [0, 1, 3, 4]])
        assert (thin[:, 5] - thin[:, 2] >= 2).all() and (thin[:, 2] >= 0).all() and (thin[:, 5] < 64).all()
    shares = [(b[:, 5] - b[:, 2] + 1).sum() / object_slices(b) for b in (boxes, thinner(boxes, 20))]
    assert shares[1] == pytest.approx(shares[0], rel=0.2)  # objects in a slice


def test_scaling_multiplies_calls_and_nothing_else():
    row = {f"{stage}_s": 1.0 for stage in STAGES} | {"encoded": 20, "encoded_of": 100, "decoded": 10, "decoded_of": 30}
    wanted = {"read": 1, "enhance": 5, "encode": 5, "decode": 3, "upsample": 3, "other": 1, "write": 1}
    assert scaled(row) == wanted and list(wanted) == list(STAGES)


def times(**of):
    """Times with one row each: of maps "case|system" to seconds, all of them spent in `encode`."""
    rows = []
    for key, seconds in of.items():
        case, system = key.split("|")
        row = {"case": case, "system": system, "repeat": 1, "seconds": seconds, "peak_mb": 500.0, "values": "0.5 0.25"}
        row |= {f"{stage}_s": seconds * (stage == "encode") for stage in STAGES}
        row |= {"encoded": 1, "encoded_of": 1, "decoded": 1, "decoded_of": 1, "slices": 1, "slices_of": 1}
        rows.append(row)
    return rows


COUNTS = {"encoder": 10_000_000_000, "decoder": 1_000_000_000, "fast image": 0, "fast box": 0, "fast cell": 0}
SETTINGS = {"multiply-adds": COUNTS, "threads": 2, "processor": "a processor"}


def test_parts_and_ratios_stand_beside_what_they_are_compared_with():
    best, six = "fixed proposed openvino", SIX_OBJECTS.name
    rows = times(**{
        "encoder|torch": 0.4, "encoder|fast": 0.3, "encoder|openvino": 0.1, "peak|int8": 0.0039, "peak|float32": 0.02,
        f"{six}|{BASELINE}": 40, f"{six}|{RELEASED}": 9.9, f"{six}|{OURS}": 2.4, f"{six}|{best}": 1.0,
        "nsd|ours": 1.0, "nsd|surface-distance": 3.5,
    })  # fmt: skip
    text = parts_text(Times(rows), SETTINGS)
    assert "| encoder, 10.0 G multiply-adds | openvino | 0.1 | 4 | 0.5 | 2.56 |\n" in text
    assert "| NSD of six organs in 256 x 512 x 512 | ours | 1 | 3.5 | - | - |\n" in text
    assert "int8 peak, of large matrix products: 256 G a second (median); the encoder's in 39 ms at best." in text
    assert text.endswith("differ by at most 0.0e+00.\n")
    rows[-1]["values"] = "0.5 0.2500001"
    assert parts_text(Times(rows), SETTINGS).endswith("differ by at most 1.0e-07.\n")
    rows[-5]["read_s"], rows[-5]["seconds"] = 0.1, 10.0  # the released algorithm's
    line = next(line for line in times_text(rows, SETTINGS).splitlines() if line.startswith(f"| {six}"))
    assert "| 40 | 10 | 2.4 | 1 | 4 (4.04) | 4.17 (4.12) | 40 (40) | 10 (9.9) |" in line
    assert parts_text(Times([]), SETTINGS) == ""


def test_the_table_takes_medians_and_marks_what_was_timed_in_part():
    name = "3DBox_CT_0566"
    rows = times(**{f"{name}|{BASELINE}": 50.0, f"{name}|{RELEASED}": 30.0, f"{name}|{OURS}": 10.0})
    rows += [row | {"repeat": 2, "seconds": 20.0} for row in rows] + [
        row | {"repeat": 3, "seconds": 40} for row in rows
    ]
    for row in rows:
        if row["system"] == RELEASED:
            row |= {"slices": 24, "slices_of": 150, "encoded": 80, "encoded_of": 500}
    text = times_text(rows, SETTINGS)
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:6] == [name, "287 x 512 x 512", "6", "211", "51.9", "4.07"]
    assert cells[6:9] == ["40", "30", "20"] and cells[-1] == "24 of 150 slices timed"
    assert "a processor, 2 threads, median of up to 3 repeats" in text
    assert Times(rows).median(name, RELEASED, lambda row: scaled(row)["encode"]) == 30.0 * 500 / 80


# ---------------------------------------------------------------- a run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The stand-in for every model, jobs in this process; `asked` lists them, `fault` says which go wrong."""
    asked, fault = [], {"stop": None, "killed": None}

    def load(model, weights, preset, engine, force=False):
        if engine == "openvino":
            raise InputError("openvino is not installed")
        return Segmenter(BrightModel(0.4), PRESETS[preset or "fixed"], enhanced=model == "proposed")

    def child(job):
        asked.append((job["case"], job["system"], job["repeat"]))
        if len(asked) == fault["stop"]:
            raise KeyboardInterrupt
        if job["system"] == fault["killed"]:
            raise BrokenProcessPool
        return table5_work.measure(job)

    threads = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(table5_work.engines, "load", load)
    monkeypatch.setattr(table5, "in_child", child)
    monkeypatch.setattr(table5, "current_settings", lambda args: SETTINGS | {"slices": args.slices})
    for name, small in {"PEAK_SIDE": 32, "CALLS": 1, "NSD_SHAPE": (16, 32, 32)}.items():
        monkeypatch.setattr(table5_work, name, small)
    monkeypatch.chdir(tmp_path)
    yield tmp_path, asked, fault
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def run(*more, cases=("peak", "encoder", "2DBox_US_0525"), repeats=2):
    return table5.main(
        ["--cases", *cases, "--threads", "1", "--repeats", str(repeats), "--engines", "fast", "openvino", *more]
    )


def test_systems_take_turns_and_a_missing_engine_is_told_once(place, capsys):
    folder, asked, _ = place
    rows = run()
    case = "2DBox_US_0525"
    wanted = [("peak", kind, repeat) for repeat in (1, 2) for kind in ("float32", "int8")]
    wanted += [("encoder", engine, 1) for engine in ("torch", "fast", "openvino")]
    wanted += [("encoder", engine, 2) for engine in ("torch", "fast")]
    wanted += [(case, system, repeat) for repeat in (1, 2) for system in (BASELINE, RELEASED, OURS)]
    assert asked == wanted
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told == ["table5.py: left out: openvino: openvino is not installed"]
    assert len(rows) == len(wanted) - 1 and all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in rows)
    row = next(row for row in rows if row["system"] == RELEASED)
    assert row["seconds"] == pytest.approx(sum(row[f"{stage}_s"] for stage in STAGES), rel=1e-4)
    assert json.loads((folder / "results/table5/settings.json").read_text())["threads"] == 2
    assert (
        "| 2DBox_US_0525 | 256 x 256 x 3 | 1 | 0.4 | 0.11 | 3.64 |" in (folder / "results/table5/table.md").read_text()
    )


def test_a_run_goes_on_where_it_was_stopped_even_within_a_line(place):
    folder, asked, fault = place
    fault["stop"] = 7
    with pytest.raises(KeyboardInterrupt):
        run()
    path = folder / "results/table5/times.csv"
    before = path.read_text()
    assert len(before.splitlines()) == 1 + 6  # a line of names, six runs
    path.write_text(before + "2DBox_US_0525,rele")
    fault["stop"] = None
    asked.clear()
    rows = run()
    assert path.read_text().startswith(before) and len(rows) == 4 + 4 + 6
    assert asked[:2] == [("encoder", "openvino", 1), ("encoder", "torch", 2)] and len(asked) == 9
    asked.clear()
    assert run("--engines", "fast") == rows and asked == []
    assert read_times(path) == rows


def test_released_volumes_are_timed_in_part_and_ours_whole(place):
    rows = run("--slices", "6", "--engines", "fast", cases=["3DBox_MR_0121"], repeats=1)
    by_system = {row["system"]: row for row in rows}
    assert by_system[OURS]["slices"] == by_system[OURS]["slices_of"] == by_system[RELEASED]["slices_of"]
    assert by_system[RELEASED]["slices"] <= 6
    assert by_system[RELEASED]["decoded_of"] == pytest.approx(128, abs=3)  # 51.20 s at 0.40 s
    assert by_system[RELEASED]["seconds"] > sum(by_system[RELEASED][f"{stage}_s"] for stage in STAGES)


def test_what_goes_wrong_is_told_in_one_sentence(place, capsys):
    fault = place[2]
    run(cases=["2DBox_US_0525"], repeats=1)
    with pytest.raises(
        SystemExit, match="table5.py: results/table5: its times were measured with other settings; name"
    ):
        run("--slices", "5", cases=["2DBox_US_0525"])
    fault["killed"] = RELEASED
    rows = run("-o", "elsewhere", cases=["2DBox_US_0525"], repeats=1)
    assert len(rows) == 2 and "released proposed torch: its process was killed" in capsys.readouterr().out
    for more in (
        ["--repeats", "0"],
        ["--slices", "2"],
        ["--cases", "3DBox_CT_1"],
        ["--threads", "0"],
    ):
        with pytest.raises(SystemExit):
            run(*more)


# ---------------------------------------------------------------- parts, and the real thing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package was written for an older SciPy
def test_nsd_of_the_phantom_equals_the_package():
    pytest.importorskip("surface_distance")
    for number in range(len(ORGANS)):
        gt, pred = organ_pair(number, (24, 48, 48))
        assert gt.any() and pred.any() and not np.array_equal(gt, pred)
        assert nsd(pred, gt, (2.5, 0.8, 0.8)) == pytest.approx(package_nsd(pred, gt, (2.5, 0.8, 0.8)), abs=1e-9)


def test_without_the_package_the_nsd_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "surface_distance", None)
    with pytest.raises(InputError, match="requirements-dev.txt"):
        package_nsd(*organ_pair(5, (16, 32, 32)), (1.0, 1.0, 1.0))


def made_up_times(folder):
    """A times.csv and settings.json with every stage 1 s."""
    for case in table5.IN_FIGURE:
        for system in (RELEASED, OURS, "fixed proposed openvino"):
            row = {"case": case, "system": system, "repeat": 1, "seconds": 7.0, "peak_mb": 500.0}
            append_row(
                folder / "times.csv", row | {f"{stage}_s": 1.0 for stage in STAGES} | dict.fromkeys(table5.COUNTS, 1)
            )
    for kind, seconds in (("float32", 0.01), ("int8", 0.0025)):
        append_row(folder / "times.csv", {"case": "peak", "system": kind, "repeat": 1, "seconds": seconds})
    counts = {"encoder": 17_000_000_000, "decoder": 2_000_000_000, "fast image": 0, "fast box": 10**9, "fast cell": 0}
    save_json(folder / "settings.json", SETTINGS | {"multiply-adds": counts, "note": "An old machine."})


def test_the_figure_draws_every_case_and_adds_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up_times(tmp_path / "times")
    rows = table5.main(["--figure", "-o", "times"])
    assert [row["case"] for row in rows[::2]] == list(table5.IN_FIGURE)
    assert (tmp_path / "assets" / "stages.png").stat().st_size > 10_000
    with (tmp_path / "times" / "stages.csv").open(newline="") as file:
        assert [float(row["read"]) for row in csv.DictReader(file)] == [1.0] * 6
    first = rows[0]
    assert (first["case"], first["gmacs"], first["network_s"]) == ("2DBox_US_0525", 19, 2)
    assert (first["float32_floor_s"], first["int8_floor_s"]) == (pytest.approx(0.19), pytest.approx(0.0475))
    assert (tmp_path / "times" / "table.md").read_text().endswith("\n\nAn old machine.\n")
    with pytest.raises(SystemExit, match="run first: python benchmarks/table5.py --cases peak 2DBox_US_0525"):
        table5.main(["--figure", "-o", "nowhere"])


def test_the_committed_tables_are_what_the_committed_times_give(tmp_path, monkeypatch):
    results = Path(__file__).parent.parent / "results" / "table5"
    for name in ("times.csv", "settings.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    table5.main(["--figure", "-o", "."])
    for name in ("table.md", "stages.csv", "times.csv"):
        assert (tmp_path / name).read_text() == (results / name).read_text()


def test_a_drawn_case_survives_its_file(tmp_path):
    case = read_npz(write_case(tmp_path, draw(TINY[1])))
    assert case.is_3d and np.array_equal(case.boxes, boxed(TINY[1].name).boxes)


@pytest.mark.long  # six processes, each of which imports PyTorch
def test_the_real_models_run_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--cases", *(case.name for case in TINY), "--engines", "fast", "--repeats", "1", "--threads", "1"]
    assert len(table5.main([*flags, "-o", "out"])) == 6
    found = capsys.readouterr()
    assert found.err == "" and found.out.startswith("table5.py: 6 runs, best engine fast; wrote out")
    assert (tmp_path / "out" / "table.md").read_text().startswith("# Table 5 measured\n")
