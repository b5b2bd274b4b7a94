"""From cells to targets, graph and verdict, by likelihood."""
