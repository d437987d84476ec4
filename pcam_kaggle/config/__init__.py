"""Settings: the fields of an experiment, the named experiments, and those of the process.

Nothing here reads data or imports torch.
"""
