"""The work of the analysis tools, importable."""
