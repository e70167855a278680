"""State matrices: eigenbasis, spectra, constraints, initialization, growth."""
