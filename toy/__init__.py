"""A whole VLA in five minutes: a small world, its demonstrations and closed-loop evaluation."""
