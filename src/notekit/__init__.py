"""notekit: what surrounds the models and both families share: notes, MIDI, pictures, audio, training, command line."""
