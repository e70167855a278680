"""Tables, figures and pages of the analyses."""
