"""Notes, MIDI files, sound and pictures; no torch."""
