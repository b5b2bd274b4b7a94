"""What a fitted model says: programs, interventions, the graph, gene sets."""
