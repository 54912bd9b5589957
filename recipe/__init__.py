"""How our checkpoint was made. Nothing of this is in the paper; each departure has its number in PAPER_VS_CODE.md.

    python -m recipe --cache cache --device cuda --compile      both runs and the export, half an hour on an H100

The encoder starts from random weights and learns LiteMedSAM's embedding (distill.py, D13). Then everything is fine-tuned on
the masks. In both runs batches are drawn evenly and augmented where the network is, on the GPU (batches.py, D14, D15);
the learning rate makes one cycle; the moving average of the weights is what is kept.
The steps themselves are those of training.py.
"""
