"""The page of ``hf-divguard report``: one HTML file with everything in it."""
