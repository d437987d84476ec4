"""How a net is trained and predicts: loops, optimizer, augmentation, devices and processes.

What is trained belongs to `models`, where it is stored to `runs`.
"""
