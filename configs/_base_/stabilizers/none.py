# No stabilizer: the baseline.
custom_hooks = []
