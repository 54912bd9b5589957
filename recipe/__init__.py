"""How our checkpoint was made: what is added to the paper's training. D13 to D16 are rows of PAPER_VS_CODE.md.

    python -m recipe --cache cache --device cuda --compile      both runs and the export, half an hour on an H100

Run 1, distill: the encoder starts from random weights, and learns LiteMedSAM's embedding and, through LiteMedSAM's frozen
decoder, the masks (distill.py, D13). Run 2, finetune: everything learns the masks.
In both runs every modality has the same chance, images are augmented on the GPU (batches.py, D14, D15; not with
--teacher-cache), the learning rate makes one cycle, and the moving average of the weights is saved.
Losses and steps are those of training.py.
"""
