"""Ideas that several architectures share."""
