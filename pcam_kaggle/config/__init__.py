"""Settings: the fields of an experiment, the named experiments, the process and its logging.

Nothing here reads data or imports torch.
"""
