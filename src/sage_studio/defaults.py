"""What holds where nobody asks for anything else: lengths of prompts and pieces, and the sampling of a small model."""

# Lengths of a piece and of a prompt, in bars (SAGE-Music) and seconds (PerceiverS).
BARS, PROMPT_BARS = 16, 4
MUSIC_S, PROMPT_S = 60.0, 20.0
# Seconds after which a note of a generated performance is ended: longer than 99 of 100 notes that pianists play, pedal
# included (3.6 s), shorter than the ones that a small model forgets.
MAX_NOTE_S = 6.0
# The same by the names of the options.
LENGTHS = {"prompt_bars": PROMPT_BARS, "bars": BARS, "prompt_s": PROMPT_S, "music_s": MUSIC_S, "max_note_s": MAX_NOTE_S}

# What training writes into a checkpoint's generation_config.json, where every command takes its defaults from: with a
# small model, cooler and narrower than its own distribution keeps the key.
TEMPERATURE, TOP_P = 0.9, 0.95
