"""What people look at: the page of `04_infer.py --page` (app.py, objects.py, mouse.js), step 5's page (report.py)."""
