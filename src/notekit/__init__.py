"""notekit: what surrounds the models and both families share: notes, MIDI, pictures, audio, training, command line."""

# Sampling defaults of every command: with a small model, cooler and narrower than its own distribution keeps the key.
TEMPERATURE, TOP_P = 0.9, 0.95
