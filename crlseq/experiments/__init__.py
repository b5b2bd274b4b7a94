"""What fits more than once: cross-validation, benchmark, repetition."""
