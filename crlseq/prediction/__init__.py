"""Virtual cells: labels, combinations, perturbations never seen, counterfactuals."""
