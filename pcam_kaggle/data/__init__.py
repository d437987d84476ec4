"""From the competition's files to the patch store and the folds: files that are read, checked and written atomically.

Nothing here knows of a net or a run.
"""
