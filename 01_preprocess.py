"""Step 1 of 5, preprocess: each slice to 256 x 256 pixels, images to PNG, masks to run lengths. [P 2.1]

The paper's million pairs of image and mask have every size and file format, and training reads them again
and again. So they are brought to one size and stored once, in forms that are small and quick to read. ([P 2.1]
is a section of the paper; #24 and D6 are rows of PAPER_VS_CODE.md, which says where code and text differ.)

    image   (H, W) made a square by padding, so that no anatomy is stretched; resized to 256 x 256, times
            256 / max(H, W); a PNG, which loses nothing. Of a gray one steps 2 and 4 make the three channels
            that the network sees (enhance.py), so that these can be changed without a new cache:
                raw         as it is
                diffused    anisotropic diffusion of raw: less noise, and the edges stay
                equalized   histogram equalization of diffused: as much contrast as there can be
    masks   a label map of the same size, as run lengths in a pickle (PKL). With v[i] the label of pixel
            i, row by row, (start, length, label) stands for
                v[start] = v[start + 1] = ... = v[start + length - 1] = label
            so that 0 0 5 5 5 0 7 becomes (2, 3, 5), (6, 1, 7): background needs no run. A mask of
            131,072 bytes then takes a few thousand
    split   1 % of the images of each modality validate, the others train [P 3.2]

A volume becomes one image for each slice that holds an object. The paper's images are the challenge's, over
a million with masks in 10 modalities, and public ones of what is rare there [P 3.1, Table 1]: nuclei (5,426
images), hips (140), abdominal CT (30), ultrasound of the prostate (75), teeth (598). --read dataset=nuclei,
hipxray, btcv, microus, toothseg reads them as they were downloaded.

    python 01_preprocess.py -i data/train --val data/val                    folders of challenge cases
    python 01_preprocess.py -i scans --masks outlines --read modality=US_MyHospital

Writes cache/. A later run keeps what is done, and the split. Public data sets, many machines: docs/cache.md.
"""

import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import encode_runs, image_path, load_entry, mask_path, save_mask
from enhance import is_gray
from formats import cache, person_of, sources, usable_cores, writing
from formats.case import Case
from grid import GRID, pad_to_square, resize_labels_to_grid, resize_to_grid


def cache_case(folder: Path, case: Case, source: str, stamp: str = "") -> cache.CachedCase:
    """Write the images and masks of one case, a picture or the slices of a volume. [P 2.1]

    source : the name of its file.   stamp : tells a changed file."""
    assert case.image.dtype == np.uint8 and case.labels.dtype == np.uint16
    entries = []
    for name, z in cache.slice_names(case):
        # One size for all: the long side becomes 256 pixels, the short one in proportion. A label map takes
        # the nearest pixel's label, so that none is invented; an object smaller than a pixel of the grid may
        # be lost. A slice without an object teaches nothing: there is no box to ask with.
        labels = resize_labels_to_grid(case.labels[z])  # (H, W) -> (h, w), the longer of the two 256
        if not labels.any():
            continue

        # An image that shrinks gets the mean of the pixels that fall together. Gray that is stored as three
        # equal channels is one channel; step 2 gives it the paper's two others.
        image = case.image[z]  # (H, W) or (H, W, 3)
        if image.ndim == 3 and is_gray(image):
            image = image[..., 0]
        image = resize_to_grid(image)

        # Zeros at the right and at the bottom make it a square, so that no anatomy is stretched.
        # [P 2.1] pads first and then resizes: equal but for rounding.
        image, labels = pad_to_square(image, GRID), pad_to_square(labels, GRID)  # (256, 256), or 3

        # The image as PNG, which loses nothing. Of the labels only the runs, as a pickle: "easy loading
        # and saving of large amounts of structured data" in Python. The paper's runs are a value and a
        # count; with the start as well, background needs none.
        writing.save_image(image_path(folder, name), image)
        save_mask(mask_path(folder, name), encode_runs(labels), labels.shape)

        # Its row of the index has the modality and sub-modality that step 2 draws by, and the patient.
        entries.append(cache.entry_of(case, name, source, case.labels[z].shape, labels))
    return cache.case_of(case, stamp, entries)


def split_entries(entries: list[cache.CacheEntry], val_share: float = 0.01, seed: int = 0) -> list[cache.CacheEntry]:
    """Fill in the split of the rows that have none: 1 % of the images of each modality for validation. [P 3.2]"""
    sizes = Counter(entry.modality for entry in entries)
    images = Counter((entry.modality, entry.patient) for entry in entries)

    # A row that has a split keeps it, and a new one follows its patient. A person scanned in two modalities is
    # on one side with both. A person with more than half of a modality's images trains.
    chosen = {(entry.modality, entry.patient): entry.split for entry in entries if entry.split}
    sides = {person_of(entry.patient): entry.split for entry in entries if entry.split}
    needed = {person_of(patient) for (modality, patient), n in images.items() if 2 * n > sizes[modality]}
    for modality in sorted(sizes):
        patients = {patient: n for (of, patient), n in images.items() if of == modality}
        splits = {patient: chosen.get((modality, patient)) or sides.get(person_of(patient), "") for patient in patients}

        # 1 % of this modality's images, at least one. Whole patients are drawn until there are as many,
        # since to know a slice's neighbour is nearly to know the slice. An only patient is for training.
        wanted = max(1, round(val_share * sizes[modality]))
        held = sum(patients[patient] for patient, split in splits.items() if split == "val")
        free = sorted(patient for patient, split in splits.items() if not split and person_of(patient) not in needed)
        rng = np.random.default_rng((seed, zlib.crc32(modality.encode())))
        for i in rng.permutation(len(free)):
            if held < wanted and held + patients[free[i]] < sizes[modality]:
                splits[free[i]] = "val"
                held += patients[free[i]]

        # The other 99 % train.
        for patient, split in splits.items():
            chosen[modality, patient] = sides[person_of(patient)] = split or "train"
    return [entry if entry.split else replace(entry, split=chosen[entry.modality, entry.patient]) for entry in entries]


def run(args: Namespace) -> list[cache.CacheEntry]:
    # Which cases: images with their masks, sorted by name
    files, excluded, skipped, bad = sources.list_sources(args.input, args.masks, args.val, args.read, args.exclude)

    # Each case that is not done yet to PNG and PKL: `cache_case`, on all cores or many machines
    cache.start_cache(args.out, args.input, args.masks, args.val)
    entries, done = cache.cache_sources(args.out, files, args.jobs, excluded, cache_case, load_entry)

    # The index, a row an image, and the split: 99 % for training [P 3.2]
    entries = split_entries(entries, args.val_share, args.seed)
    cache.write_index(args.out, entries)

    # The validation cases at their original size, where steps 4 and 5 segment and score them
    thin = sources.write_validation_cases(args.out / "cases", done, entries, args.jobs)
    cache.finish_cache(vars(args), entries, [case for _, case in done], thin, skipped, len(files) - len(done) + bad)
    return entries


def main(argv: list[str] | None = None) -> list[cache.CacheEntry]:
    """Returns the rows of index.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("-i", "--input", type=Path, help="folder of images, labels in or beside them (docs/formats.md)")
    what.add_argument("--smoke", action="store_true", help="tiny synthetic cases in place of --input")
    p.add_argument("--masks", type=Path, help="folder of masks with the names of the images, or a COCO file")
    p.add_argument("-o", "--out", type=Path, help="folder for the cache (cache, or with --smoke a temporary one)")
    p.add_argument("--val", type=Path, help="folder of challenge cases to validate on, in place of drawing some")
    p.add_argument("--val-share", type=float, default=0.01, help="share of each modality to draw for validation")
    p.add_argument("--seed", type=int, default=0, help="seed of the draw, 0 or more")
    p.add_argument("--jobs", type=cache.workers, default=usable_cores(), help="processes, or a Dask scheduler's URL")
    p.add_argument("--exclude", type=Path, help="text file of case or slice names to leave out, one a line")
    p.add_argument("--read", nargs="+", default=[], metavar="KEY=VALUE", help="of files that need it: docs/cache.md")
    args = p.parse_args(argv)
    if not 0 < args.val_share <= 0.5 or args.seed < 0:
        p.error("--val-share must lie above 0 and up to 0.5, --seed be 0 or more")
    args.out = args.out or (None if args.smoke else Path("cache"))
    again = "; mend that and run the same command again, what is done is kept"
    with writing.script("01_preprocess.py", args, "demo_data:smoke_preprocess", again):
        with writing.one_run(args.out, *cache.FOLDERS):
            return run(args)


if __name__ == "__main__":
    main()
