"""From a file to a finished run."""
