"""Run folders: their files, when these are complete, and the import of runs trained elsewhere.

No other package knows the names of these files; how results are computed belongs to `training` and `scoring`.
"""
