"""The LIBERO simulator: tasks, a scripted expert, processes, the report."""
