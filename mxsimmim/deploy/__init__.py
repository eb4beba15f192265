"""A trained network outside of training: as files for other programs, on the command line, as a service."""
