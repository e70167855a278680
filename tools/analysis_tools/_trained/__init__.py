"""A trained model and its images, for the analysis tools."""
