"""How robot data is stored: Open X-Embodiment's table, RLDS, LeRobot."""
