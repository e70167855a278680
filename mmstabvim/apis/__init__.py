"""From a config and a checkpoint to a model and its images."""
