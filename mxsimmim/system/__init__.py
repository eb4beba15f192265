"""What the rest stands on: names and streams, file systems, paths, packages that others installed."""
