"""A policy outside this process: an HTTP server, a WidowX."""
