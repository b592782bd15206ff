"""From a checkpoint to the Hub: a complete repository, its card, the push, the endpoint's handler, the Space."""
