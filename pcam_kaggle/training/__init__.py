"""Training and prediction: loops over batches, augmentation, devices and processes."""
