"""What a model can do, measured: tasks made from a seed, and the share that it gets right beside that of guessing."""
