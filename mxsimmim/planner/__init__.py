"""The choice of a layout for a job, by a model of its time and memory. What is measured imports MXNet, and it alone."""
