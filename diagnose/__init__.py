"""Why does a policy not work? Verdicts, and a look at the data."""
