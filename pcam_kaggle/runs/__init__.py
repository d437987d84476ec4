"""The one owner of a run folder: its files, when they are complete, and runs that were trained elsewhere.

How they are computed belongs to `training` and `scoring`.
"""
