"""What people look at and click: windows that show a case and answer the mouse.

window.py is the window of `04_infer.py --draw`: a box drawn on an image or on a slice of a volume, its mask at once. Only
this folder opens windows. The network, the masks and the files are those of the other modules; nothing is computed here.
"""
