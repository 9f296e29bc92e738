"""How others store data: Open X-Embodiment's table, RLDS, LeRobot, training runs of the official code."""
