"""Music from a checkpoint: `bars` (SAGE-Music) and `seconds` (PerceiverS), alone, in batches, streamed, by the
folder."""
