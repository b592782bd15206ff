"""Tokenizer of SAGE-Music: MidiTok's REMI+ (all programs in one stream) as a `PreTrainedTokenizer`.

Token text and ids go through the usual tokenizer methods (`"Bar_None TimeSig_4/4 Position_0"`); music goes through
`midi_to_ids` and `decode_midi`. Vocabularies extended by MidiTok's BPE training work the same way: a merged token is
written as its base tokens joined by `+`.

Source: REMI, Huang and Yang 2020; REMI+, von Rütte et al. 2022; MidiTok, Fradet et al. 2021.
"""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from miditok import REMI, TokenizerConfig, TokSequence
from symusic import Note, Score, Tempo, TimeSignature, Track
from transformers import PreTrainedTokenizer

ATTRIBUTES = {
    "structure": ("PAD", "BOS", "EOS", "Bar", "Position", "TimeSig", "Tempo"),
    "instrument": ("Program",),
    "pitch": ("Pitch", "PitchDrum"),
    "velocity": ("Velocity",),
    "duration": ("Duration",),
}
# Durations in beats: onsets' own grid up to four beats, half of it to eight, then eighths and quarters.
DURATION_GRID = {(0, 4): 1.0, (4, 8): 0.5, (8, 16): 1 / 6, (16, 32): 1 / 12}


class SageMusicTokenizer(PreTrainedTokenizer):
    """REMI+ tokenizer: one stream `Bar TimeSig Position Tempo Program Pitch Velocity Duration ...` for all tracks.

    Args:
        vocab_file: a `miditok.json` written by `save_pretrained` or by MidiTok (BPE-trained or not). With it, the
            music options below are read from the file.
        beat_resolution: onset grid, in positions per beat; a beat is a quarter note, or the denominator of x/8, x/16.
        num_velocities: velocity bins over 0-127.
        num_tempos: tempo bins, logarithmic over 30-240 quarter notes per minute.
        program_changes: write a Program token only where the program changes, not before every note.
        track_programs: programs (0-127) for tracks of these names (upper case) in files whose note-bearing melodic
            tracks share one program, which one token stream would otherwise merge. The default covers POP909.

    The stated grid: onsets to `1 / beat_resolution` beat; durations to the same grid up to 4 beats, coarser to 32 beats
    and clipped there; velocities, tempos to the nearest bin; meters n/2 become 2n/4; meters MidiTok has no token for
    keep the meter before them. Sustain pedal, controllers and pitch bend have no tokens.

    A MidiTok file may be of a smaller REMI: without meters, and then all is 4/4; without tempos; without programs, and
    then all melodic tracks are one piano. Special tokens besides PAD, BOS and EOS, such as MASK, are in no music.

    Raises:
        ValueError: for a MidiTok file that is not REMI with velocities and durations on every note and PAD, BOS, EOS;
            that has programs but not one stream for all, or no PitchDrum tokens for the drums among them; or that has
            tokens of other kinds (rests, chords, pedals, ...).
    """

    vocab_files_names = {"vocab_file": "miditok.json"}  # noqa: RUF012 (class variable of the base class)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        beat_resolution: int = 12,
        num_velocities: int = 32,
        num_tempos: int = 64,
        program_changes: bool = True,
        track_programs: dict[str, int] | None = None,
        **kwargs,
    ):
        if vocab_file is not None:
            self.miditok = REMI(params=Path(vocab_file))
            _check_supported(self.miditok)
        else:
            meters = list(range(1, 13))
            self.miditok = REMI(
                TokenizerConfig(
                    pitch_range=(0, 127),
                    drums_pitch_range=(0, 127),
                    beat_res={span: max(1, round(beat_resolution * k)) for span, k in DURATION_GRID.items()},
                    num_velocities=num_velocities,
                    special_tokens=["PAD", "BOS", "EOS"],
                    use_programs=True,
                    one_token_stream_for_programs=True,
                    program_changes=program_changes,
                    use_time_signatures=True,
                    time_signature_range={4: meters, 8: meters, 16: meters},
                    use_tempos=True,
                    num_tempos=num_tempos,
                    tempo_range=(30, 240),
                    log_tempos=True,
                    delete_equal_successive_tempo_changes=True,
                )
            )
        self.track_programs = {"MELODY": 73, "BRIDGE": 25} if track_programs is None else track_programs
        self._index_vocabulary()
        for name in ("pad_token", "bos_token", "eos_token"):
            kwargs.setdefault(name, f"{name[:3].upper()}_None")
        super().__init__(track_programs=self.track_programs, **kwargs)

    def _index_vocabulary(self):
        model = self.miditok.vocab_model
        if model is None:
            self._base_tokens = [(token,) for token, _ in sorted(self.miditok.vocab.items(), key=lambda item: item[1])]
        else:
            to_tokens = self.miditok._vocab_learned_bytes_to_tokens
            self._base_tokens = [tuple(to_tokens[text]) for text, _ in sorted(model.items(), key=lambda item: item[1])]
        # MidiTok's BPE keeps one entry that spells nothing, for word boundaries.
        self._token_texts = ["+".join(tokens) or "Boundary" for tokens in self._base_tokens]
        self._token_ids = {text: index for index, text in enumerate(self._token_texts)}
        self._first_types = np.array([text.split("_")[0] for text in self._token_texts])
        # Special tokens that no music holds, MASK for one: kinds of their own.
        self._other_specials = [kind for kind in _special_kinds(self.miditok) if kind not in ATTRIBUTES["structure"]]

    # ---- the vocabulary, as Transformers asks for it

    @property
    def vocab_size(self) -> int:
        return len(self._token_texts)

    def get_vocab(self) -> dict[str, int]:
        return {**self._token_ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._token_ids:
            raise ValueError(
                f"{token!r} is no token: tokens look like 'Pitch_60' or 'Bar_None'. For music, call midi_to_ids."
            )
        return self._token_ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._token_texts):
            raise ValueError(f"token id {index} is outside the vocabulary of {len(self._token_texts)} tokens.")
        return self._token_texts[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}miditok.json"
        self.miditok.save(path)
        return (str(path),)

    # ---- music to ids

    def midi_to_ids(self, source, add_special_tokens: bool = True, bars: int | None = None) -> list[int]:
        """Token ids of one piece.

        Args:
            source: a path, MIDI bytes, a `symusic.Score`, or a structured note array with `onset_s`, `duration_s`
                (seconds), `pitch`, `velocity`, `program` (drums -1); arrays are laid on a grid of 120 quarter notes a
                minute, 4/4.
            add_special_tokens: put BOS in front. (EOS is for training data: see `sage_studio.corpus`.)
            bars: keep only the first so many bars.

        Raises:
            ValueError: not MIDI, or no notes in it; the message names the file.
        """
        sequence = self.miditok.encode(self._prepare(self._load(source)), encode_ids=False)
        tokens = (sequence if self.miditok.one_token_stream else sequence[0]).tokens
        if bars is not None:
            tokens = tokens[: _bar_end(tokens, bars)]
        sequence = TokSequence(tokens=tokens)
        self.miditok.complete_sequence(sequence)
        if self.miditok.is_trained and tokens:
            self.miditok.encode_token_ids(sequence)
        return [self.bos_token_id] * add_special_tokens + list(sequence.ids)

    def _load(self, source) -> Score:
        if isinstance(source, np.ndarray):
            return _score_of_notes(source)
        name = "<bytes>"
        if isinstance(source, str | os.PathLike):
            name, source = os.fspath(source), Path(source).read_bytes()
        if isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
            if damage := midi_damage(data):
                raise ValueError(f"{name}: {damage}.")
            try:
                source = Score.from_midi(data)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{name}: not a readable MIDI file ({error}).") from error
        elif hasattr(source, "to"):
            name, source = "<score>", source.to("tick")
        else:
            raise ValueError(
                f"cannot read music from {type(source).__name__}: give a path, bytes, Score or note array."
            )
        if source.ticks_per_quarter <= 0 or source.note_num() == 0:
            raise ValueError(f"{name}: this MIDI file holds no notes.")
        return source

    def _prepare(self, score: Score) -> Score:
        """A copy on which REMI keeps every note: shared programs told apart, n/2 meters written as 2n/4."""
        score = score.copy()
        melodic = [track for track in score.tracks if not track.is_drum and len(track.notes)]
        counts: dict[int, int] = {}
        for track in melodic:
            counts[track.program] = counts.get(track.program, 0) + 1
        for track in melodic:
            name = track.name.strip().upper()
            if counts[track.program] > 1 and name in self.track_programs:
                track.program = self.track_programs[name]
        if not self.miditok.config.use_programs:
            score.tracks = type(score.tracks)([_one_track(score)])
        supported = set(self.miditok.time_signatures)
        kept = []
        for meter in score.time_signatures:
            pair = (meter.numerator, meter.denominator)
            if pair not in supported and pair[1] < 4:
                pair = (pair[0] * 4 // pair[1], 4)
            if pair in supported:
                kept.append(TimeSignature(meter.time, *pair))
            else:
                warnings.warn(f"no token for the meter {pair[0]}/{pair[1]}: the meter before it goes on", stacklevel=4)
        score.time_signatures = type(score.time_signatures)(kept)
        # One order for notes of one moment, whatever order the file's tracks came in: programs upwards, drums last.
        score.tracks = type(score.tracks)(sorted(score.tracks, key=lambda track: (track.is_drum, track.program)))
        low, high = self.miditok.config.tempo_range
        score.tempos = type(score.tempos)(
            [Tempo(tempo.time, min(max(tempo.qpm, low), high)) for tempo in score.tempos if np.isfinite(tempo.qpm)]
        )
        return score

    # ---- ids to music

    def base_tokens(self, ids: Iterable[int]) -> list[str]:
        """The base tokens (`"Pitch_60"`) of `ids`, merged tokens taken apart, PAD, BOS and EOS left out."""
        special = {*self.all_special_ids, *(self._token_ids[f"{kind}_None"] for kind in self._other_specials)}
        tokens: list[str] = []
        for index in ids:
            self._convert_id_to_token(int(index))
            if int(index) not in special:
                tokens.extend(self._base_tokens[int(index)])
        return tokens

    def decode_midi(self, ids, bars: int | None = None) -> Score:
        """The `symusic.Score` of ids (list, array or tensor of shape `(T,)`), or of their first `bars` bars.

        Raises:
            ValueError: an id outside the vocabulary, or a batch of sequences.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and isinstance(ids[0], Sequence):
            raise ValueError("decode_midi takes one sequence; call it for each row of a batch.")
        tokens = self.base_tokens(ids)
        if bars is not None:
            tokens = tokens[: _bar_end(tokens, bars)]
        sequence = TokSequence(tokens=tokens)
        return self.miditok._tokens_to_score(sequence if self.miditok.one_token_stream else [sequence])

    def transpose_ids(self, ids: np.ndarray, semitones: int) -> np.ndarray:
        """`ids` with every melodic pitch moved by `semitones`; drums stay. Untrained (non-BPE) vocabularies only.

        Raises:
            ValueError: a BPE vocabulary, or a pitch that would leave the vocabulary's.
        """
        if self.miditok.is_trained:
            raise ValueError("transpose the score, not the ids, under a BPE vocabulary: its tokens hold whole notes.")
        first, last = (self._token_ids[f"Pitch_{pitch}"] for pitch in self.miditok.config.pitch_range)
        melodic = (ids >= first) & (ids <= last)
        moved = np.where(melodic, ids + semitones, ids)
        if np.any(melodic & ((moved < first) | (moved > last))):
            raise ValueError(f"transposing by {semitones} semitones leaves the vocabulary's pitch range.")
        return moved

    def crop_ids(self, ids: np.ndarray, start: int) -> np.ndarray:
        """BOS and `ids[start:]`, `start` at a bar line, with the tempo and the current program stated again.

        A sequence cut in the middle would otherwise not know its tempo, nor, with Program tokens on change only, which
        instrument its first notes belong to. Under BPE the ids are cut as they are.
        """
        before, after = np.asarray(ids[:start]), np.asarray(ids[start:])
        if not self.miditok.is_trained:
            old, new = self._first_types[before], self._first_types[after]
            position, pitch = (
                np.flatnonzero(new == "Position")[:1],
                np.flatnonzero(np.char.startswith(new, "Pitch"))[:1],
            )
            tempo, program = np.flatnonzero(old == "Tempo")[-1:], np.flatnonzero(old == "Program")[-1:]
            if len(pitch) and len(program) and not (new[: pitch[0]] == "Program").any():
                after = np.insert(after, pitch[0], before[program[0]])
            if len(position) and len(tempo) and not (new[: position[0] + 2] == "Tempo").any():
                after = np.insert(after, position[0] + 1, before[tempo[0]])
        return np.concatenate([[self.bos_token_id], after])

    # ---- what a model config needs to know about the tokens

    def config_fields(self) -> dict:
        """Keyword arguments for `SageMusicConfig`: vocabulary size, special ids, attribute map and grammar."""
        types = [*(name for group in ATTRIBUTES.values() for name in group), *self._other_specials]
        attribute_of = {name: index for index, group in enumerate(ATTRIBUTES.values()) for name in group}
        attribute_of |= dict.fromkeys(self._other_specials, list(ATTRIBUTES).index("structure"))
        kinds = [[token.split("_")[0] for token in tokens] or ["PAD"] for tokens in self._base_tokens]
        follows = self._may_follow()
        features = [self._grammar_features(tokens) for tokens in self._base_tokens]
        grammar = {
            "types": types,
            "transitions": [[b in follows[a] for b in types] for a in types],
            "first_type": [types.index(kind[0]) for kind in kinds],
            "last_type": [types.index(kind[-1]) for kind in kinds],
            "notes": [sum(k in ATTRIBUTES["pitch"] for k in kind) for kind in kinds],
            **{key: [feature[key] for feature in features] for key in features[0]},
        }
        return {
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "attribute_names": list(ATTRIBUTES),
            "token_attribute_ids": [attribute_of[kind[-1]] for kind in kinds],
            "grammar": grammar,
        }

    def _may_follow(self) -> dict[str, set[str]]:
        config = self.miditok.config
        note = {"Pitch", "PitchDrum"}
        if config.use_programs:
            note = {"Program"} | note if config.program_changes else {"Program"}
        bar_content = {"Position", "Bar", "EOS"}
        return {
            "PAD": {"PAD", "BOS"},
            "BOS": {"Bar"},
            "EOS": {"PAD", "EOS"},
            "Bar": {"TimeSig"} if config.use_time_signatures else bar_content,
            "TimeSig": bar_content,
            "Position": {"Tempo"} | note,
            "Tempo": bar_content | note,
            "Program": {"Pitch", "PitchDrum"},
            "Pitch": {"Velocity"},
            "PitchDrum": {"Velocity"},
            "Velocity": {"Duration"},
            "Duration": bar_content | note,
            **{kind: {"BOS", "Bar"} for kind in self._other_specials},
        }

    def _grammar_features(self, tokens: Sequence[str]) -> dict[str, int]:
        """What one token asks of the bar it lands in, and leaves behind; see `MidiGrammarLogitsProcessor`."""
        positions_per_beat = self.miditok.config.max_num_pos_per_beat
        use_programs = self.miditok.config.use_programs
        found = {
            "bars": 0,  # bar lines in the token
            "first_position": -1,  # first and last Position before any bar line; -1: none
            "last_position": -1,
            "drum_needed": -1,  # kind of the first note before any Program: 0 melodic, 1 drum; -1: none
            "position_after": -2,  # position the token leaves behind, -1: a fresh bar; -2: unchanged
            "bar_length_after": -2,  # positions of a bar under its last TimeSig; -2: unchanged
            "drum_after": -2,  # kind of its last Program, -1: unknown (BOS); -2: unchanged
        }
        for token in tokens:
            kind, value = token.split("_")
            if kind in ("Bar", "BOS"):
                found["bars"] += kind == "Bar"
                found["position_after"] = -1
                if kind == "BOS":
                    found["drum_after"] = -1
            elif kind == "TimeSig":
                found["bar_length_after"] = int(value.split("/")[0]) * positions_per_beat
            elif kind == "Position":
                if not found["bars"] and found["bar_length_after"] == -2:
                    if found["first_position"] == -1:
                        found["first_position"] = int(value)
                    found["last_position"] = int(value)
                found["position_after"] = int(value)
            elif kind == "Program":
                found["drum_after"] = int(value == "-1")
            elif kind in ATTRIBUTES["pitch"] and found["drum_after"] == -2 and found["drum_needed"] == -1:
                found["drum_needed"] = int(kind == "PitchDrum") if use_programs else -1
        return found


def _special_kinds(miditok: REMI) -> list[str]:
    """Kinds of the special tokens, `"PAD"` of `PAD_None`."""
    return [token.split("_")[0] for token in miditok.special_tokens]


def _check_supported(miditok: REMI):
    config = miditok.config
    programs = ("one_token_stream_for_programs", "use_pitchdrum_tokens") if config.use_programs else ()
    missing = [name for name in ("use_velocities", *programs) if not getattr(config, name)]
    durations = set(config.programs if config.use_programs else [0]) <= set(config.use_note_duration_programs)
    missing += [] if durations else ["Duration tokens on every note"]
    missing += [f"the special token {kind}" for kind in ("PAD", "BOS", "EOS") if kind not in _special_kinds(miditok)]
    known = {name for group in ATTRIBUTES.values() for name in group} | set(_special_kinds(miditok))
    extra = {token.split("_")[0] for token in miditok.vocab} - known
    extra |= {token for token in miditok.vocab if token.startswith("Bar_") and token != "Bar_None"}
    if missing or extra:
        raise ValueError(
            "this MidiTok vocabulary is not the REMI+ that SAGE-Music reads: "
            + "; ".join(
                ([f"it needs {', '.join(missing)}"] if missing else [])
                + ([f"it has unknown token types {', '.join(sorted(extra))}"] if extra else [])
            )
            + "."
        )


def _one_track(score: Score) -> Track:
    """All melodic notes of a score as one piano, or its drums where there is nothing else."""
    heard = [track for track in score.tracks if not track.is_drum and len(track.notes)] or list(score.tracks)
    left = sum(len(track.notes) for track in score.tracks) - sum(len(track.notes) for track in heard)
    if left:
        warnings.warn(f"no tokens for programs: {left} drum notes are left out", stacklevel=5)
    whole = Track(program=0, is_drum=heard[0].is_drum)
    for track in heard:
        whole.notes.extend(track.notes)
    whole.sort()
    return whole


def midi_damage(data: bytes) -> str:
    """Why a MIDI file is not read, by its header, chunks and events; "" for nothing.

    Some readers return what they got of a broken file, and some crash: a note number above 127 has no place in memory.
    """
    if not data:
        return "the file is empty"
    if not data.startswith(b"MThd"):
        return "not a MIDI file (it does not begin with 'MThd')"
    if data[12:13] >= b"\x80":
        return "times are SMPTE frames, not beats: export it with ticks per quarter note"
    delta = rb"[\x80-\xff]{0,3}[\x00-\x7f]"
    two = rb"[\x80-\xbf\xe0-\xef][\x00-\x7f]{2}(?:" + delta + rb"[\x00-\x7f]{2})*+"
    one = rb"[\xc0-\xdf][\x00-\x7f](?:" + delta + rb"[\x00-\x7f])*+"
    events = delta + rb"(?:" + two + rb"|" + one + rb")"  # of one kind and channel, which only the first one states
    run_of_events, stated, number, other_event = map(
        re.compile, (rb"(?:" + events + rb")++", events, delta, rb"\xff[\x00-\x7f]|\xf0")
    )
    position, missing = 8 + int.from_bytes(data[4:8], "big"), int.from_bytes(data[10:12], "big")
    while missing > 0 and position + 8 <= len(data):  # what follows the last track is nobody's loss
        at, end = position + 8, position + 8 + int.from_bytes(data[position + 4 : position + 8], "big")
        is_track, position, latest = data[position : position + 4] == b"MTrk", end, None
        running = 0
        missing -= is_track
        while is_track and at < end <= len(data):
            if run := run_of_events.match(data, at, end):  # most of a file
                at, latest, running = run.end(), run, None
                continue
            wait = number.match(data, at, end)
            if wait is None or wait.end() == end:
                return "damaged or truncated MIDI (a track ends inside an event)"
            at = wait.end()
            if data[at] == 0xF7:
                return "an escape event, F7, which readers take for another: export the file without"
            if event := other_event.match(data, at, end):
                length = number.match(data, event.end(), end)
                size = 0
                for byte in length[0] if length else b"":
                    size = size << 7 | byte & 0x7F
                if length is None or length.end() + size > end:
                    return "damaged or truncated MIDI (a track ends inside an event)"
                if event[0] == b"\xff\x2f":  # the end of the track
                    break
                at = length.end() + size
            else:  # an event without a status of its own after one of no channel, or nothing that can be read
                if running is None:
                    *_, last = stated.finditer(data, *latest.span())
                    running = data[number.match(data, last.start()).end()]
                size = 1 if 0xC0 <= running < 0xE0 else 2
                if not running or len(values := data[at : min(at + size, end)]) < size or max(values) > 0x7F:
                    return "damaged or truncated MIDI (an event of a kind or with values that no MIDI file has)"
                at += size
    if position > len(data) or missing > 0:
        return "damaged or truncated MIDI (it ends before its own chunk sizes say)"
    return ""


def _bar_end(tokens: Sequence[str], bars: int) -> int:
    """Index just after the last token of the first `bars` bars."""
    starts = [index for index, token in enumerate(tokens) if token.startswith("Bar_")]
    return starts[bars] if bars < len(starts) else len(tokens)


def _score_of_notes(notes: np.ndarray, ticks_per_quarter: int = 480, qpm: float = 120.0) -> Score:
    names = notes.dtype.names or ()
    missing = [n for n in ("onset_s", "duration_s", "pitch", "velocity", "program") if n not in names]
    if missing or not len(notes):
        raise ValueError(f"a note array needs notes and the fields onset_s ... program; missing: {missing or 'notes'}.")
    score = Score(ticks_per_quarter)
    score.tempos.append(Tempo(0, qpm))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    per_second = ticks_per_quarter * qpm / 60
    for program in np.unique(notes["program"]).tolist():
        chosen = notes[notes["program"] == program]
        track = Track(program=max(program, 0), is_drum=program < 0)
        onset = np.round(chosen["onset_s"] * per_second).astype(np.int32)
        end = np.round((chosen["onset_s"] + chosen["duration_s"]) * per_second).astype(np.int32)
        track.notes = Note.from_numpy(
            time=onset,
            duration=np.maximum(end - onset, 1),
            pitch=chosen["pitch"].astype(np.int8),
            velocity=chosen["velocity"].astype(np.int8),
        )
        score.tracks.append(track)
    return score


__all__ = ["SageMusicTokenizer"]
