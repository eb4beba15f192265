"""What is trained: data, network, evaluation of each task."""
