"""Bytes on disk: files written whole or not at all, checkpoints, the place of a run."""
