"""Speed and memory beside stock models of the same shape, measured in turn in one process."""
