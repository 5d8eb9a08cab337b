"""Checkpoint folders as data: written, judged, ordered and deleted with the standard library alone."""
