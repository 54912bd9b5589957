"""Step 4 of 5, infer: boxes to masks, and the seconds that it takes. [P 2.2, 4.3]

The image encoder does nine tenths of the network's multiply-adds, and it sees no box. So an image is encoded
once, and each of its boxes then costs one pass of the light mask decoder [P 2.2]:

    image (H, W) -> 256 grid, three channels -> image encoder -> embedding (1, 256, 64, 64), kept
    box (4,) -> 256 grid -> prompt encoder, and with the embedding the mask decoder
             -> logits (256, 256) and a predicted IoU -> upsampled to (H, W), a mask where above 0
             -> painted onto the label map: box i becomes label i + 1

With e seconds for the encoder and d for the decoder, about 0.26 and 0.06 on two cores, an image with
N boxes takes e + N d, and not N (e + d). A volume is done slice by slice, in a way of ours (D6), as the
paper describes none:

    volume (D, H, W), box (6,) -> middle slice, asked with the box itself -> its mask
             -> the slices outwards both ways, each asked with a box made of the mask on the slice before
             -> each slice encoded once for all objects in it

Boxes are typed, drawn, or read beside the image; or they are those of the image's labels, exact or
loosened as people draw them, so that step 5 can score what the masks add to the boxes. A box that
touches its object and one that a hand drew around it ask for two contours with the same four numbers.
So our checkpoint has a mask decoder for each (D24); who knows better than where the boxes come from
says --boxes exact or --boxes drawn.

The paper measures running time file by file, and says that dynamic int8 makes the network faster
[P 2.3, 4.3]: `--engine torch-int8`, and step 3 measures it. Where each case's seconds went: efficiency.csv.

    python 04_infer.py -i examples -o out          a folder of images with boxes.csv, or of .npz cases
    python 04_infer.py -i examples/retina.jpg -o out --box 44 200 112 274     (or --page: in a browser)

All flags: --help. What it reads, and every file that it writes: docs/formats.md.
"""

import argparse
import os
import time
from pathlib import Path

# NumPy's own threads would take cores from the network's, and wait on them
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

import segment
from enhance import network_input
from figures import PALETTE, flat_view, overlay
from formats import readers, results, writing
from formats.case import Case
from presets import preset_options
from volumes import Found, segment_volume


def find_masks(segmenter: segment.Segmenter, case: Case) -> Found:
    """The masks of a case's boxes: one embedding, and from it a mask for each box. [P 2.2]"""
    if case.is_3d:
        # Ours (D6): from the middle slice of each box outwards both ways
        return segment_volume(segmenter, case, lambda z: writing.progress(z, case.name, unit="slice", leave=False))

    # [P 2.1] The image on the 256 grid, as the network saw images in training: of one gray channel three
    with segmenter.stage("enhance"):
        channels = network_input(case.image, segmenter.preset, segmenter.enhanced)  # (3, 256, 256) in [0, 1]
    # The heavy part, once, without any box: the image encoder
    with segmenter.stage("encode"):
        embedding = segmenter.engine.encode(channels)  # (1, 256, 64, 64)

    # The light part, once a box:
    #   its two corners on the 256 grid -> prompt encoder -> tokens (2, 256)
    #   tokens and embedding -> mask decoder -> logits, and the IoU that the network expects of its mask
    #   logits -> upsampled to pixels of the image, bilinear; the mask is where they are above 0
    # Where two masks overlap, the canvas gives the pixel to the higher logit (D5), or, as the released
    # code does, to the later box
    canvas = segmenter.new_canvas(np.zeros(case.grid_shape, np.uint16), len(case.boxes))
    predicted_iou, own_pixels = [], []
    asked = segmenter.decode_boxes(embedding, case.boxes, case.grid_shape, case.boxes_are)
    for label, (mask, iou) in enumerate(asked, start=1):
        with segmenter.stage("upsample"):
            canvas.paint(label, mask)
        predicted_iou.append(iou)
        # Pixels of the mask, also those that another object covers
        own_pixels.append(np.count_nonzero(mask.values > 0))
    return Found(canvas.labels, np.array(predicted_iou), np.array(own_pixels))


def run(args: argparse.Namespace) -> list[dict]:
    """Segment every case, write its label map, and note what took how long. -> rows of efficiency.csv"""
    job = results.Job(
        args.input, args.output, args.box, args.boxes_from_masks, readers.window_of(args.read), args.boxes
    )
    segmenter = load_model(args)
    for path in job.paths():
        with job.or_left_out(path):
            case, read_s = job.read(path)
            before, start = segmenter.seconds.copy(), time.perf_counter()

            # Boxes to masks. Boxes that were taken from masks get the numbers of those masks when saved
            found = find_masks(segmenter, case)
            segmented = time.perf_counter()
            found = job.save(path, case, found, PALETTE)
            written = time.perf_counter()

            # Running time of this case alone, from file to file, as the challenge's clock runs [P 4.3, Table 5].
            # Loading the network does not count: one process does all cases
            # A stage that no slice reached took none: the released loop may visit no slice at all (#41)
            spent = {s: segmenter.seconds[s] - before[s] for s in ("enhance", "encode", "decode", "upsample")}
            seconds = {
                "read_s": read_s,
                "enhance_s": spent["enhance"],  # 256 grid, three channels
                "encode_s": spent["encode"],  # once an image or slice
                "decode_s": spent["decode"],  # once a box
                "upsample_s": spent["upsample"],  # masks at the image's size
                "write_s": written - segmented,
                "total_s": read_s + written - start,
            }
            job.note(case, found, seconds)

            # Image, boxes and masks in one picture [P Fig. 3]. The challenge asks for none; no clock runs here
            if picture := job.picture(path, case):
                writing.save_image(picture, overlay(*flat_view(case.image, found.labels, case.boxes), numbers=True))
    writing.tell(f"04_infer.py: {job.finish(vars(args), segmenter.engine.kinds)}")
    return job.rows


def load_model(args: argparse.Namespace) -> segment.Segmenter:
    # proposed is the paper's network, baseline is LiteMedSAM [P 4]; engine torch-int8 has its linear layers
    # in int8 [P 2.3]; a preset is a reading of the paper, where its text and its code differ (presets.py)
    preset, force, settings = preset_options(args.preset)
    engine, options = segment.engine_options(args.engine)
    segmenter = segment.load(args.model, None, preset, engine, force, settings, **options)
    if args.boxes:
        segmenter.kind_to_ask(args.boxes)
    args.preset_fields = vars(segmenter.preset)
    writing.tell(f"04_infer.py: {args.model}, preset {segmenter.preset.name}, engine {engine}")
    return segmenter


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-i", "--input", type=Path, help="a folder of cases, a file, or a DICOM folder")
    p.add_argument("-o", "--output", type=Path, default=Path("segs"), help="made if missing (default: segs)")
    boxes = p.add_mutually_exclusive_group()
    boxes.add_argument("--box", type=float, nargs="+", action="append", help="X0 Y0 X1 Y1, in 3D X0 Y0 Z0 X1 Y1 Z1")
    boxes.add_argument("--page", action="store_true", help="a page to draw boxes in, with a browser on this computer")
    p.add_argument("--boxes", "--boxes-from-masks", nargs="?", const="0", action="append", default=[], metavar="KIND|SHARE",
                   help=f"how they were made: {', '.join(segment.BOX_KINDS)}; a number, or nothing: those of labels, loosened")  # fmt: skip
    p.add_argument("--model", default="proposed", metavar="NAME|FILE", help="proposed (default), baseline, or a file")
    p.add_argument("--preset", nargs="+", default=[], metavar=("NAME", "FIELD=VALUE"), help="presets.py; or force=yes")
    p.add_argument("--engine", nargs="+", default=["torch"], help=f"{', '.join(segment.ENGINES)}; then KEY=VALUE")
    p.add_argument("--read", nargs="+", default=[], metavar="KEY=VALUE", help="window=lung or =400/40, modality=CT")
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead of --input")
    args = p.parse_args(argv)
    shares = [text for text in args.boxes if text.lstrip("-").replace(".", "", 1).isdecimal()]
    kinds = [text for text in args.boxes if text not in shares]
    if shares and (args.box or args.page):
        p.error(f"argument --boxes-from-masks: not allowed with argument {'--box' if args.box else '--page'}")
    args.boxes_from_masks, args.boxes = float(shares[-1]) if shares else None, kinds[-1] if kinds else None
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    with writing.script("04_infer.py", args, "demo_data:smoke_infer"):
        if args.page:
            from page.app import Desk, serve  # only here: it needs a package more

            asked, settings = readers.window_of(args.read), {"model": args.model, "boxes_are": args.boxes or "drawn"}
            load = lambda model: load_model(argparse.Namespace(**vars(args) | {"model": model}))  # noqa: E731
            return serve(Desk(load, asked, settings | {"overlap": "keep"}, args.input, args.output, vars(args)))
        with writing.one_run(args.output, "overlays"):
            return run(args)


if __name__ == "__main__":
    main()
