"""How our checkpoint is trained. __main__.py runs it; its header is the manual.

own_masks.py  LiteMedSAM's masks as labels      batches.py  draws and augments
loop.py       one run, what it adds to Table 3  pack.py     files for a machine without network
Losses, validation and resuming are training.py's. Departures: D13 to D15, D20, D24 and D25 of
PAPER_VS_CODE.md. The first runs were made by an earlier form of it, commit 2f27bea, which also had a term for the
contour (D22) and its own average of checkpoints (D21, today `--average`): see the model card.
"""
