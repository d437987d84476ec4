"""What every other sub-package uses: errors, files, paths, settings, named experiments, logging and the process.

Nothing here reads patches or imports torch.
"""
