"""Finding, recording and reporting non-finite values; needs no Mamba."""
