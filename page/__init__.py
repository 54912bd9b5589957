"""What people look at and click: windows that show a case and answer the mouse.

window.py is the window of `04_infer.py --draw`: a box drawn on an image or on a slice of a volume, its
mask at once. objects.py is what has been drawn in it. report.py is the page that step 5 writes.
"""
