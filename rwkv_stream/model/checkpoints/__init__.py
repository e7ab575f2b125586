"""Files that hold a model, of every container and layout: what they say, and how their tensors are read."""
