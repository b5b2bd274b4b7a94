"""A fitted model in answers: programs, interventions, DAG, tests, metrics."""
