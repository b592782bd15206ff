"""Around the models: music, checkpoints, generation, corpora, training, evaluation, publishing, the command line."""
