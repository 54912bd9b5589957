"""How our checkpoint was made: what is added to the paper's training. D13 to D16, D20 and D21 are rows of PAPER_VS_CODE.md.

    python -m recipe --cache cache --device cuda --compile      four runs and the export; most of it needs a GPU
    python -m recipe --cache cache --stage loosen --init CHECKPOINT --steps 1000     run 3: an hour on two cores

Run 1, distill: the encoder starts from random weights, and learns LiteMedSAM's embedding and, through LiteMedSAM's frozen
decoder, the masks (distill.py, D13). Run 2, finetune: everything learns the masks. Run 3, loosen: most boxes are as loose as
people draw them (D20); decoder, neck and last stage of the encoder learn, the rest is frozen, so that a CPU suffices. Run 4,
contour: the same with a term for the contour (D22).
In all runs every modality has the same chance, images are augmented (batches.py, D14, D15; not with --teacher-cache), the
learning rate makes one cycle, and the moving average of the weights is saved. Losses and steps are those of training.py.
Last, `python -m recipe --average` averages results with what they started from (average.py, D21).
"""
