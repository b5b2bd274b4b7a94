"""The command line: a file for every kind of command."""
