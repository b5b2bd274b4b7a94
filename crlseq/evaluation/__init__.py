"""How good a fit is: held-out cells, baselines, metrics, known truths."""
