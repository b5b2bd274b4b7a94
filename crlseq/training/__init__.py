"""Schedules, the training loop and checkpoints."""
