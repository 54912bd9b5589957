"""Companion notebooks, one a stage, and what they share: plots.py draws, network.py draws Figure 1, and
paper_tables.py remakes the paper's tables.

`python -m notebooks` runs and writes them all. They import the repository's modules and redefine nothing.
"""
