"""The LIBERO simulator: tasks, processes, a scripted expert, demonstrations, the report. See eval_libero.py."""
