"""What people look at: the window of `04_infer.py --draw` (window.py, objects.py), step 5's page (report.py)."""
