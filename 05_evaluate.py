"""Step 5 of 5, evaluate: DSC and NSD of every object, means, tables, figures. [P 3.1, 4]

The paper measures three things, by which the challenge ranks. With A the predicted mask of an object, B
the true one, and A', B' their contours (volumes: surfaces):

    DSC = 2 |A and B| / (|A| + |B|)                       how much of the two overlaps
    NSD = (|A' near B'| + |B' near A'|) / (|A'| + |B'|)   near: within 2 pixels (volumes: 2 mm), as in the challenge
    seconds of a case, as step 4 wrote them

Both scores run from 0 to 1. DSC says whether the object was found: a disk with a radius of 100 pixels
that is drawn 5 too large still has 0.95. NSD says whether the edge is right: the same disk has 0. A
score s of object k in case c of modality m goes into the tables as a mean of means (the challenge's of the
objects; the last row of the paper's tables is one of the modalities):

    s_mc = 1/K_mc sum_k s_mck   a case: the mean over its K_mc objects, large and small alike
    S_m = 1/n_m sum_c s_mc      a row of Table 4: the mean over the n_m cases of a modality
    S = 1/M sum_m S_m           its last row: the mean over the M modalities, however many cases each has

What the paper found, in per cent:
                                         DSC     NSD
    Table 4    baseline (LiteMedSAM)     83.83   95.20   means S over 9 modalities
               the same in int8          84.06   95.32
               proposed model            88.20   98.05
               the same in int8          88.54   98.28   no loss from int8 [P 4.1, 4.3]
    Table 6    on the hidden test set    78.95   81.73   NSD fell most in CT, MR and PET [P 4.4]
    Table 5    three times as fast as the baseline on average [P 4.3]; benchmarks/speed.py times cases of its sizes
    Figure 2   the three channels of a gray image [P 2.1]
    Figure 3   box prompts, predictions, truth [P 4.2]

Do not compare these numbers with ours. The released code scores one object of each 256-pixel slice, by the
challenge's NSD (#48). Here all objects of whole cases are scored at their original size, by the NSD of the
contour, and by the challenge's beside it.

    python 05_evaluate.py --segs ours=segs baseline=segs_baseline --gts demo/gts --images demo/imgs

Writes table.md, report.html and .csv files; with --images also figure2.png and figure3.png.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import tables
from figures import draw_figures
from formats import usable_cores, writing
from metrics import PROTOCOLS, case_scores
from page.report import write_report


def score_case(truth: tables.Truth, masks: dict, protocols: tuple[str, ...]) -> Iterator[dict]:
    """A row of each system: the case's means s_mc, "dsc_strict", ..., and labels, {label: {score: s_mck}}. nan: no score.

    masks: {system: its label map}."""
    for system, predicted in masks.items():
        row = {"system": system, **truth.about, "labels": {}}
        # "challenge" scores as the challenge's evaluator, which takes a picture for a slab one voxel thick. Its
        # flat faces count as surface and hide errors of the contour: so the paper's NSD, 98, can lie above its
        # DSC, 88 (#49). "strict" measures the contour itself (D10)
        for protocol in protocols:
            # [P 3.1] DSC and NSD of each object. One that was missed has 0: else a network would gain by
            # leaving out what is hard. The case has their mean: a small tumour counts as much as a liver
            found = case_scores(predicted, truth.labels, truth.spacing_mm, protocol)
            row |= {f"{metric}_{protocol}": s_mc for metric, s_mc in found.means.items()}
            for metric, s_mck in found.scores.items():
                for label, score in zip(found.labels, s_mck.tolist(), strict=True):
                    row["labels"].setdefault(label, {})[f"{metric}_{protocol}"] = score
        yield row


def run(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Returns (summary, problems). InputError if nothing can be scored, or no figure drawn."""
    systems, shown, files, problems = tables.find_inputs(args.segs, args.show, args.gts)
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)

    # 1. DSC and NSD of every object of every case, s_mck and s_mc. That all systems were asked with the same
    #    boxes is for you to see to
    rows = tables.score_all(score_case, protocols, files, systems, args.looseness, args.jobs, problems)
    # The third measure is time [P 3.1, 4.3]: seconds from reading a case to its written masks
    rows = tables.with_times(rows, systems)

    # 2. S_m and S [P Table 4, where M = 9: OCT and mammography, which we have too, are not in it]. Cases that
    #    were drawn for the demo are not in S unless all were: they show that something runs, not how well
    summary = tables.summarize(rows)

    # 3. Is one system better than another? [P 4.1] subtracts the baseline's S from the proposed model's: 4.37
    #    more of DSC, 2.85 of NSD. [P 4.3] finds no loss from float to int8. With the scores a_mc and b_mc of
    #    two systems at the same cases and boxes, that difference is
    #        D = 1/M sum_m 1/n_m sum_c (a_mc - b_mc)
    #    tables.py tells how far it would move with other cases of the same kind, by a bootstrap
    first, *others = systems
    pairs = [(system, first) for system in others] + [(s, box) for s in systems for box in tables.REFERENCES]
    differences = tables.paired_differences(rows, pairs)

    # 4. Tables 4 and 6: a row a modality, for each system a column of DSC, NSD and seconds. Read the rows, not
    #    the average alone. In the paper microscopy gains 17 of DSC, while X-ray, endoscopy and fundus lose a
    #    little [P 4.1]. And a validation set is not yet new data: on the hidden test set DSC was 9.6 lower and
    #    NSD 16.6, which fell most in volumes [P 4.4]
    writing.tell(tables.write_tables(vars(args), rows, summary, differences, protocols))

    # 5. Figures 2 and 3. In the paper's Figure 3 a mammogram and a head CT succeed. The lower two rows fail:
    #    their boxes hold more than one thing, and the network takes the wrong one, the whole lung in place of
    #    its pneumothorax, bones in place of the lungs [P 4.2]. report.html shows the worst cases, and whether
    #    the IoU that the network predicts of its own masks tells good ones from bad ones
    folders = (args.images, systems[shown], args.gts)
    write_report(args.out, rows, summary, protocols[0], shown, folders, args.looseness, problems)
    if args.images:
        draw_figures(args.out, [row for row in rows if row["system"] == shown], args.figures, *folders)
    done = f"{len({row['case'] for row in rows})} cases, problems: {len(problems)}"
    writing.tell(f"05_evaluate.py: {done}; wrote report.html, table.md and more to {args.out}")
    return summary, problems


def main(argv: list[str] | None = None) -> dict[tuple[str, str], dict]:
    """Returns {(system, modality or "Average"): cases, objects, mean scores 0..1, mean seconds}."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-s", "--segs", nargs="+", metavar="NAME=FOLDER", help="folders of predictions, .npz with segs")
    p.add_argument("-g", "--gts", type=Path, help="folder of ground truth, .npz with gts (3D: and spacing)")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: eval; with --smoke: eval/smoke)")
    p.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both", help="how to score (default: both)")
    p.add_argument("--jobs", type=int, default=min(usable_cores(), 61), help="processes (default: cores, at most 61)")
    p.add_argument("--looseness", type=float, default=0.0, metavar="SHARE", help="of the boxes that step 4 asked with")
    p.add_argument("--images", type=Path, help="folder of the cases' images: draw Figures 2 and 3 (default: draw none)")
    p.add_argument("--figures", nargs="+", default=[], metavar="CASE", help="cases that they show (default: the first)")
    p.add_argument("--show", metavar="NAME", help="system in figures and report (default: the first of --segs)")
    p.add_argument("--smoke", action="store_true", help="score two tiny synthetic cases, CPU, about 1 s")
    args = p.parse_args(argv)
    args.out = args.out or Path("eval/smoke" if args.smoke else "eval")
    if args.jobs < 1 or not 0 <= args.looseness < float("inf") or not (args.smoke or args.segs and args.gts):
        p.error("give --segs NAME=FOLDER and --gts FOLDER, or --smoke; --jobs from 1, --looseness from 0")
    if args.figures and not args.images:
        p.error("--figures shows images; give their folder with --images")
    with writing.script("05_evaluate.py", args, "demo_data:smoke_evaluate"), writing.one_run(args.out):
        summary, problems = run(args)
    if problems:
        raise SystemExit(1)
    return summary


if __name__ == "__main__":
    main()
