"""A finished fit: its tables and facts, read from and written to a run folder."""
