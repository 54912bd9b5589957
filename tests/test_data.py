"""data.py and the cache: run-length masks are exact, a pickle cannot run code, no patient is cut apart."""

import importlib
import json
import os
import pickle
import pickletools
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as any_

from data import decode_runs, encode_runs, image_path, load_entry, load_mask, mask_path, save_mask
from demo_data import tiny_case
from formats import InputError
from formats.cache import CachedCase, CacheEntry, fingerprint, read_index, read_journal, write_index
from formats.case import Case
from grid import grid_size

preprocess = importlib.import_module("01_preprocess")  # `import 01_preprocess` is a syntax error
cache_case, split_entries = preprocess.cache_case, preprocess.split_entries
GOLDEN = Path(__file__).parent / "golden"
RELEASED = GOLDEN / "released_rle_mask.pkl"


def loop_runs(mask):
    """The released layout by a plain loop: (start from 1, length, value), background between objects included."""
    padded = np.concatenate([[0], mask.flatten(), [0]])
    edges = np.where(padded[1:] != padded[:-1])[0] + 1
    return [(edges[i], edges[i + 1] - edges[i], padded[edges[i]]) for i in range(len(edges) - 1)]


def random_masks():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (7, 1), (5, 6), (61, 64)):
        for density in (0.0, 0.1, 0.9, 1.0):
            values = rng.integers(1, 65_536, shape).astype(np.uint16)
            yield np.where(rng.random(shape) < density, values, 0).astype(np.uint16)
            yield np.repeat(np.repeat(values, 3, axis=0), 3, axis=1)


def squares(count=324):
    mask = np.zeros((256, 256), np.uint16)
    for i in range(count):
        y, x = divmod(i, 18)
        mask[2 + 14 * y : 11 + 14 * y, 2 + 14 * x : 11 + 14 * x] = i + 1
    return mask


def golden_mask():
    return np.load(GOLDEN / "released_rle_mask_decoded.npz")["mask"]


# Run-length code


def test_the_code_equals_a_plain_loop_and_decodes_exactly():
    for mask in [*random_masks(), golden_mask(), squares()]:
        runs = encode_runs(mask)
        assert runs.dtype == np.int32 and runs.shape[1] == 3
        assert runs.tolist() == [[start - 1, length, value] for start, length, value in loop_runs(mask) if value]
        back = decode_runs(runs, mask.shape)
        assert back.dtype == np.uint16 and np.array_equal(back, mask)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=any_.tuples(any_.integers(1, 9), any_.integers(1, 9)),
    values=any_.lists(any_.sampled_from([0, 0, 1, 2, 255, 256, 65_535]), min_size=1, max_size=81),
)
def test_any_label_map_comes_back_from_its_runs_and_from_its_file(shape, values):
    mask = np.resize(np.array(values, np.uint16), shape)
    assert np.array_equal(decode_runs(encode_runs(mask), shape), mask)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.pkl"
        save_mask(path, encode_runs(mask), shape)
        assert np.array_equal(load_mask(path, shape), mask)


numbers = any_.one_of(any_.integers(-5, 20), any_.sampled_from([2**15, 65_536, 2**31 - 1, 2**31, 2**62, -(2**63)]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(runs=any_.lists(any_.tuples(numbers, numbers, numbers), max_size=5))
def test_any_runs_are_refused_or_are_those_of_the_map_that_they_give(runs):
    runs = np.array(runs, np.int64).reshape(-1, 3)
    try:
        mask = decode_runs(runs, (3, 4))
    except InputError:
        return
    joined = decode_runs(encode_runs(mask), (3, 4))
    assert np.array_equal(joined, mask) and mask.astype(bool).sum() == runs[:, 1].sum()


def test_a_run_goes_on_across_rows_and_other_integer_types_are_coded_alike():
    mask = np.array([[0, 5, 5], [5, 0, 7]])
    for dtype in (np.uint8, np.int32, np.int64):
        assert encode_runs(mask.astype(dtype)).tolist() == [[1, 3, 5], [5, 1, 7]]
    assert encode_runs(np.asfortranarray(mask)).tolist() == [[1, 3, 5], [5, 1, 7]]
    assert encode_runs(np.zeros((4, 4), int)).shape == (0, 3)


@pytest.mark.parametrize(
    "runs",
    [
        [[0, 3, 1], [2, 2, 1]],  # overlap
        [[4, 2, 1], [0, 2, 1]],  # backwards
        [[0, 13, 1]],  # past the end
        [[12, 1, 1]],
        [[-1, 2, 1]],
        [[0, 0, 1]],
        [[0, -2, 1]],
        [[0, 2, 0]],
        [[0, 2, 65_536]],
        [[0, 2, -1]],
        [[2**62, 2**62, 1]],  # the sum wraps
    ],
)
def test_runs_that_are_no_mask_are_refused(runs):
    with pytest.raises(InputError, match="overlap, leave the 3 x 4 mask"):
        decode_runs(np.array(runs, np.int64), (3, 4))


def test_arrays_that_are_no_runs_are_refused():
    for bad in (np.zeros((2, 2), int), np.zeros(3, int), np.zeros((1, 3))):
        with pytest.raises(InputError, match=r"shape \(n, 3\)"):
            decode_runs(bad, (3, 4))


# The pickle


def test_our_file_names_nothing_and_is_read_without_this_code(tmp_path):
    for mask in (golden_mask(), squares(), np.zeros((256, 256), np.uint16)):
        path, runs = tmp_path / "a.pkl", encode_runs(mask)
        size = save_mask(path, runs, mask.shape)
        assert size == path.stat().st_size <= 12 * len(runs) + 60
        names = {opcode.name for opcode, *_ in pickletools.genops(path.read_bytes())} & {
            "GLOBAL",
            "STACK_GLOBAL",
            "REDUCE",
        }
        assert not names
        shape, content = pickle.loads(path.read_bytes())
        assert shape == (256, 256) and np.array_equal(np.frombuffer(content, "<i4").reshape(-1, 3), runs)
        assert np.array_equal(load_mask(path), mask)


def test_the_released_file_reads_exactly_and_ours_is_an_eighth_of_it(tmp_path):
    mask = golden_mask()
    assert np.array_equal(load_mask(RELEASED), mask)
    assert load_mask(RELEASED).dtype == np.uint16
    assert save_mask(tmp_path / "a.pkl", encode_runs(mask), mask.shape) * 8 <= RELEASED.stat().st_size == 16_445


def test_the_released_file_is_read_as_numpy_1_wrote_it(tmp_path):
    content = RELEASED.read_bytes()
    old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    if old.startswith(b"\x80\x04\x95"):  # the frame is one byte shorter
        old = old[:3] + (int.from_bytes(old[3:11], "little") - 1).to_bytes(8, "little") + old[11:]
    assert old != content
    (tmp_path / "a.pkl").write_bytes(old)
    assert np.array_equal(load_mask(tmp_path / "a.pkl"), golden_mask())


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [int, "<i8", ">i4", "u2", "i8"])
def test_the_released_layout_is_read_in_every_kind_of_whole_number(protocol, dtype, tmp_path):
    for mask in (np.zeros((256, 256), np.uint16), squares(5)):
        if dtype == "u2":
            mask = mask[:100]  # so that every start fits
        number = int if dtype is int else lambda n: np.array(n, dtype)[()]
        rows = [tuple(number(n) for n in row) for row in loop_runs(mask)]
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(rows, protocol=protocol))
        assert np.array_equal(load_mask(tmp_path / "a.pkl", mask.shape), mask)


class Attack:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    trace = tmp_path / "ran"
    attacks = [
        Attack(os.system, f"touch {trace}"),
        Attack(eval, f"open({str(trace)!r}, 'w')"),
        Attack(exec, f"open({str(trace)!r}, 'w')"),
        Attack(open, str(trace), "w"),
        Attack(os.mkdir, str(trace)),
        Attack(getattr, "a", "upper"),
        Attack(np.load, str(trace)),
        Attack(np.save, str(trace), 1),
        [(Attack(os.mkdir, str(trace)), 1, 1)],
    ]
    for attack in attacks:
        for protocol in (2, 4, 5):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(attack, protocol=protocol))
            with pytest.raises(InputError, match=r"could run code; refused, nothing was run") as caught:
                load_mask(tmp_path / "a.pkl")
            assert "\n" not in str(caught.value) and not trace.exists()


def test_only_whole_numbers_come_out_of_numpys_names(tmp_path):
    objects = np.empty(1, object)
    objects[0] = np.arange(3)
    odd = [
        objects,
        encode_runs(squares(3)),  # an array, as caches of version 2 had
        np.array(["a"]),
        np.zeros(2, [("start", "i4"), ("length", "O")]),
        np.zeros((2, 3)),
        np.datetime64("2024-06-17"),
        np.dtype("O"),
        [(np.float64(3.0), 1, 1)],
        [(np.dtype("i4"), 1, 1)],
    ]
    for thing in odd:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(thing, protocol=4))
        with pytest.raises(InputError, match="not a run-length mask") as caught:
            load_mask(tmp_path / "a.pkl")
        assert "\n" not in str(caught.value)
    # a pickle that sets attributes of what it may name: (None, {...}) is a state for setattr
    hostile = b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93N}\x8c\x06values\x8c\x01xs\x86b."
    (tmp_path / "a.pkl").write_bytes(hostile)
    with pytest.raises(InputError, match="not a run-length mask"):
        load_mask(tmp_path / "a.pkl")
    assert np.array_equal(load_mask(RELEASED), golden_mask())


def test_cut_empty_missing_and_wrong_files_are_told_in_a_sentence(tmp_path):
    content = RELEASED.read_bytes()
    wrong = [content[:n] for n in (0, 1, 12, 400, len(content) - 1)]
    wrong += [b"no pickle", b"\x89PNG\r\n", pickle.dumps({"mask": 1}), pickle.dumps([1, 2]), pickle.dumps([(1, 2)])]
    wrong += [pickle.dumps([(1, 70_000, 1)]), pickle.dumps([("a", "b", "c")]), pickle.dumps(((256, 256), [1, 2, 3]))]
    # of another shape, of a size beyond all memory, and bytes that are no whole runs
    run = np.array([[0, 1, 1]], "<i4").tobytes()
    wrong += [pickle.dumps(stored) for stored in (((256, 255), run), ((1 << 40, 1 << 40), run), ((256, 256), run[:-1]))]
    row = [1] * 1000
    wrong += [pickle.dumps([row] * 1000), pickle.dumps([(row, row, row)])]  # grows a thousandfold if it is unfolded
    for bad in wrong:
        (tmp_path / "a.pkl").write_bytes(bad)
        with pytest.raises(InputError, match=r"a\.pkl: not a run-length mask \(.+01_preprocess") as caught:
            load_mask(tmp_path / "a.pkl")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file; run first"):
        load_mask(tmp_path / "none.pkl")


# Cases, entries, index


def test_a_2d_case_is_stored_on_the_padded_grid(tmp_path):
    case = tiny_case()  # 64 x 80, two objects
    cached = cache_case(tmp_path, case, "a.npz")
    (entry,) = cached.entries
    assert (entry.name, entry.modality, entry.submodality) == ("2DBox_US_tiny0", "US", "US")
    assert (entry.height, entry.width, entry.objects, entry.split) == (64, 80, 2, "")
    assert (cached.objects, cached.empty, cached.lost) == (2, 0, 0)
    image, labels = load_entry(tmp_path, entry)
    height, width = grid_size(64, 80)
    assert image.shape == labels.shape == (256, 256) and (image.dtype, labels.dtype) == (np.uint8, np.uint16)
    assert not image[height:].any() and not labels[height:].any() and width == 256
    assert image[:height].any() and np.unique(labels).tolist() == [0, 1, 2]
    for label in (1, 2):  # area grows with the square of the scale
        want = np.count_nonzero(case.labels == label) * (256 / 80) ** 2
        assert np.count_nonzero(labels == label) == pytest.approx(want, rel=0.02)


def test_colour_stays_in_order_and_three_equal_channels_become_one(tmp_path):
    labels = np.zeros((40, 30), np.uint16)
    labels[10:20, 10:20] = 9
    red = np.zeros((40, 30, 3), np.uint8)
    red[..., 0] = 200
    (entry,) = cache_case(tmp_path, Case("Fundus_red", red, None, labels, None, False), "r").entries
    image, mask = load_entry(tmp_path, entry)
    assert image.shape == (256, 256, 3) and image[5, 5].tolist() == [200, 0, 0]
    assert set(np.unique(mask)) == {0, 9}
    (entry,) = cache_case(tmp_path, Case("US_gray", np.full_like(red, 80), None, labels, None, False), "g").entries
    assert load_entry(tmp_path, entry)[0].shape == (256, 256)


def test_a_volume_becomes_its_slices_with_objects_and_labels_above_255_survive(tmp_path):
    phantom = tiny_case(dims=3)
    labels = np.array([0, 1, 40_000], np.uint16)[phantom.labels]
    labels[2] = 0
    full = [z for z in range(len(labels)) if labels[z].any()]
    case = Case("3D_CT_tiny_STS-001", phantom.image, None, labels, None, True)
    cached = cache_case(tmp_path, case, "v.npz")
    assert [entry.name for entry in cached.entries] == [f"3D_CT_tiny_STS-001-{z:03d}" for z in full] and 2 not in full
    assert {entry.patient for entry in cached.entries} == {"CT_tiny_STS-001"}
    assert cached.objects == 2 and cached.empty == len(labels) - len(full)
    assert max(load_entry(tmp_path, entry)[1].max() for entry in cached.entries) == 40_000


def test_objects_that_vanish_on_the_grid_are_counted_and_an_image_without_any_is_left_out(tmp_path):
    labels = np.zeros((2560, 2560), np.uint16)
    labels[0, 0] = 1  # one pixel of a cell of 10 x 10, not the centre one
    labels[500:900, 500:900] = 2
    image = np.zeros(labels.shape, np.uint8)
    cached = cache_case(tmp_path, Case("US_a", image, None, labels, None, False), "a")
    assert (cached.objects, cached.lost, cached.entries[0].objects) == (2, 1, 1)
    labels[labels == 2] = 0
    cached = cache_case(tmp_path, Case("US_b", image, None, labels, None, False), "b")
    assert (cached.entries, cached.lost, cached.empty) == ([], 1, 0)
    assert not image_path(tmp_path, "US_b").exists()


def test_index_and_journal_come_back_and_the_fingerprint_follows_the_index(tmp_path):
    entries = cache_case(tmp_path, replace(tiny_case(dims=3), name="CT_é, comma_1"), "v.npz", "stamp").entries
    entries = split_entries(entries)
    write_index(tmp_path, entries[::-1])
    assert read_index(tmp_path) == entries
    first = fingerprint(tmp_path)
    write_index(tmp_path, entries)
    assert fingerprint(tmp_path) == first and len(first) == 64
    write_index(tmp_path, entries[1:])
    assert fingerprint(tmp_path) != first

    entries = [replace(entry, split="") for entry in entries]
    cached, later = (CachedCase("a", stamp, entries, 2, 1, 0, 3) for stamp in ("stamp", "later"))
    text, second = (f"\n{json.dumps(asdict(case))}" for case in (cached, later))
    (tmp_path / "done.jsonl").write_text(text[:90] + text + text[:60], encoding="utf-8")
    assert read_journal(tmp_path) == {"a": cached}
    (tmp_path / "done.jsonl").write_text(text[:90] + text + second + text[:60], encoding="utf-8")
    assert read_journal(tmp_path) == {"a": later}  # of two lines for one case the later one counts
    assert read_journal(tmp_path / "none") == {}


def test_a_wrong_index_and_another_version_are_told(tmp_path):
    with pytest.raises(InputError, match="no cache here .*, and run first: python 01_preprocess.py"):
        read_index(tmp_path / "none")
    entries = split_entries(cache_case(tmp_path, tiny_case(), "a").entries)
    write_index(tmp_path, entries)
    good = (tmp_path / "index.csv").read_text()
    for bad in ("", good.replace("name,", "nome,"), good.replace(",train,", ",test,"), good.replace(",80,", ",x,"),
                good.replace("2DBox_US_tiny0,", "../2DBox_US_tiny0,"), good + "a,b\n", good + "\x00"):  # fmt: skip
        (tmp_path / "index.csv").write_text(bad)
        with pytest.raises(InputError, match="index.csv: not an index of this cache"):
            read_index(tmp_path)
    (tmp_path / "index.csv").unlink()
    with pytest.raises(InputError, match="index.csv: cannot be read"):
        read_index(tmp_path)
    (tmp_path / "version.json").write_text('{"cache": 7}')
    for call in (lambda: read_index(tmp_path), lambda: write_index(tmp_path, entries)):
        with pytest.raises(
            InputError, match="a cache of version 7, but this code reads version 3; delete an old cache"
        ):
            call()
    (tmp_path / "version.json").write_text("[")
    with pytest.raises(InputError, match="no good version.json"):
        read_index(tmp_path)


def test_a_damaged_entry_is_not_readable(tmp_path):
    (entry,) = cache_case(tmp_path, tiny_case(), "a").entries
    for path in (image_path(tmp_path, entry.name), mask_path(tmp_path, entry.name)):
        load_entry(tmp_path, entry)
        content = path.read_bytes()
        path.write_bytes(content[:20])
        with pytest.raises(InputError):
            load_entry(tmp_path, entry)
        path.unlink()
        with pytest.raises(InputError):
            load_entry(tmp_path, entry)
        path.write_bytes(content)


# The split


def rows(modality, patients, each, split=""):
    return [
        CacheEntry(f"{modality}_{p}-{i:03d}", modality, modality, f"{modality}_{p}", "", 9, 9, split, 1)
        for p in range(patients)
        for i in range(each)
    ]


def test_the_split_takes_about_one_per_cent_of_each_modality_by_patient():
    entries = rows("CT", 200, 20) + rows("US", 300, 1) + rows("PET", 3, 5)
    split = split_entries(entries)
    assert [entry.name for entry in split] == [entry.name for entry in entries]
    count = Counter((entry.modality, entry.split) for entry in split)
    assert count["CT", "val"] == 40 and count["US", "val"] == 3 and count["PET", "val"] == 5
    by_patient = {}
    for entry in split:
        by_patient.setdefault(entry.patient, set()).add(entry.split)
    assert all(len(splits) == 1 for splits in by_patient.values())


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    entries = rows("CT", 50, 3) + rows("US", 90, 1)

    def held_out(entries, seed):
        return {entry.name for entry in split_entries(entries, 0.05, seed) if entry.split == "val"}

    assert held_out(entries, 0) == held_out(entries[::-1], 0) != held_out(entries, 1)
    assert {name for name in held_out(entries, 0) if name.startswith("US")} == held_out(rows("US", 90, 1), 0)


def test_an_only_or_a_dominant_patient_stays_in_training():
    assert {entry.split for entry in split_entries(rows("OCT", 1, 30))} == {"train"}
    entries = rows("OCT", 1, 30) + [CacheEntry("OCT_b", "OCT", "OCT", "OCT_b", "", 9, 9, "", 1)]
    for seed in range(9):
        assert [entry.name for entry in split_entries(entries, seed=seed) if entry.split == "val"] == ["OCT_b"]


def test_a_split_that_is_there_stays_and_new_slices_follow_their_patient():
    first = split_entries(rows("CT", 30, 2))
    again = split_entries(first + [e for e in rows("CT", 60, 4) if e.name not in {f.name for f in first}], seed=5)
    assert again[: len(first)] == first
    side = {entry.patient: entry.split for entry in first}
    assert all(entry.split == side.get(entry.patient, entry.split) for entry in again)


@pytest.mark.parametrize("seed", range(20))
def test_a_patient_with_images_of_two_modalities_is_on_one_side(seed):
    def scans(modality, patients):
        return [
            CacheEntry(f"{modality}_STS_STS-{p:03d}-{z}", modality, "", f"{modality}_STS_STS-{p:03d}", "", 9, 9, "", 1)
            for p in patients
            for z in range(4)
        ]  # fmt: skip

    split = split_entries(scans("CT", range(20)) + scans("MR", range(5, 25)) + scans("PET", [7, 8]), 0.2, seed)
    sides = {}
    for entry in split:
        sides.setdefault(entry.patient.split("_", 1)[1], set()).add(entry.split)
    assert all(len(side) == 1 for side in sides.values()), "a person is on both sides"
    held = Counter(entry.modality for entry in split if entry.split == "val")
    assert 8 <= held["CT"] <= 24 and 8 <= held["MR"] <= 40
    assert {entry.split for entry in split if entry.modality == "PET"} >= {"train"}
