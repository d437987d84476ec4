"""Run folders: their files, whose names no other package knows, when these are complete, and the import of runs."""
