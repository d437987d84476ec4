"""Training and prediction: loops over batches, augmentation, devices and processes.

Models are defined in `models`, the files of a run in `runs`.
"""
