"""What every other sub-package uses: errors, files, paths, configs, experiments, logging and the process; without torch."""
