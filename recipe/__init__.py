"""How our checkpoint was made. batches.py draws and augments, loop.py trains, __main__.py runs both.

Losses, validation and resuming are training.py's. What is added to Table 3 is D13 to D15 and D20 to
D22 of PAPER_VS_CODE.md.
"""
