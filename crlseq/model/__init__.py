"""The model in torch alone: structural equations, networks, losses."""
