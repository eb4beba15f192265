"""The trainer, its timetable, checkpoints and run folder, metrics and plots."""
