"""A SoundFont as the synthesizer reads it: each sample's pitch in its own header, no loop that rounding makes empty."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from symusic import Score

# The records of a SoundFont's tables (SoundFont 2.04, section 7), each table closed by one record that only ends it.
_BAGS = np.dtype([("first", "<u2"), ("modulator", "<u2")])
_GENERATORS = np.dtype([("kind", "<u2"), ("value", "<u2")])
_TABLES = {
    "phdr": np.dtype([("name", "S20"), ("preset", "<u2"), ("bank", "<u2"), ("first", "<u2"), ("rest", "<u4", 3)]),
    "pbag": _BAGS,
    "pmod": np.dtype([("rest", "<u2", 5)]),
    "pgen": _GENERATORS,
    "inst": np.dtype([("name", "S20"), ("first", "<u2")]),
    "ibag": _BAGS,
    "imod": np.dtype([("rest", "<u2", 5)]),
    "igen": _GENERATORS,
    "shdr": np.dtype(
        {
            "names": ["name", "start", "end", "loop", "loop_end", "rate", "root", "cents", "link", "type"],
            "formats": ["S20", *["<u4"] * 5, "u1", "i1", "<u2", "<u2"],
        }
    ),
}
_OWNED = {"phdr": "pbag", "pbag": "pgen", "inst": "ibag", "ibag": "igen"}  # the tables in which `first` counts
# Generators by their numbers (section 8.1.2). SOUND_KINDS are those that the synthesizer applies, with their defaults.
_INSTRUMENT, _KEYS, _VELOCITIES, _ATTENUATION, _COARSE, _FINE = 41, 43, 44, 48, 51, 52
_SAMPLE, _MODE, _SCALE, _ROOT = 53, 54, 56, 58
_SOUND_KINDS = {17: 0, **dict.fromkeys(range(33, 37), -12000), 37: 0, 38: -12000, 48: 0}
_RELEASE, _STEEPER = 38, 1200  # timecents: a release falls evenly here, by the standard in dB, so in half the time
_LOOP_FRAMES = 4096  # a loop is repeated until it is as long: its end is rounded to a whole frame when it is played
_BEYOND = 512  # samples after a loop: what it becomes is read up to the loop's end, and rounding made that too short
_DRUM_BANK = 128  # where symusic plays drums


class SoundFontError(ValueError):
    """A file that is no SoundFont, or not enough of one. `str()` names it."""


def playable(path: Path, score: Score, sample_rate: int) -> bytes:
    """A SoundFont of the instruments that `score` needs of the one at `path`, such that the synthesizer plays it right.

    symusic 0.5.9 takes the pitch of a sample from the sample's header alone. The root key and coarse tuning that a zone
    states, on which most SoundFonts rely, it leaves out: TimGM6mb's piano sounds 20 semitones sharp. A loop that so, or
    at a low `sample_rate`, becomes shorter than one frame is rounded to none, and copying that until the note is full
    never ends. Here each zone has a header of its own that states its pitch, and a loop is repeated until rounding
    cannot be heard. A key whose tone the rate cannot hold, or whose loop would still be too short, has no zone: it is
    silent.

    Raises:
        SoundFontError: `path` is not a SoundFont, or its instruments have more zones than a SoundFont can hold.
    """
    version, samples, tables = _read_soundfont(path)
    wanted = {
        (bank, track.program)
        for track in score.tracks
        for bank in ([_DRUM_BANK] if track.is_drum else [0, *(c.value for c in track.controls if c.number == 0)])
    }
    made: dict[str, list[tuple]] = {name: [] for name in _TABLES}
    sound, starts, headers = bytearray(), {}, {}
    for index, preset in enumerate(tables["phdr"][:-1]):
        name, number, bank = preset["name"], int(preset["preset"]), int(preset["bank"])
        if (bank, number) not in wanted:
            continue
        made["phdr"].append((name, number, bank, len(made["pbag"]), (0, 0, 0)))
        made["pbag"].append((len(made["pgen"]), 0))
        made["pgen"].append((_INSTRUMENT, len(made["inst"])))
        made["inst"].append((name, len(made["ibag"])))
        for zone in _zones(tables, index, version, len(samples)):
            for lowest, highest, root, cents in zone.runs(sample_rate):
                # The synthesizer shares what it has made of a sample between the notes of one pitch, and knows a sample
                # by where it starts: zones that differ in more than their keys get a copy each.
                if zone.content not in starts:
                    starts[zone.content] = len(sound) // samples.itemsize
                    sound += zone.sound(samples)
                header = zone.header(starts[zone.content], root, cents)
                made["ibag"].append((len(made["igen"]), 0))
                made["igen"].append((_KEYS, lowest | highest << 8))  # the first, as the format demands
                made["igen"] += [(kind, value & 0xFFFF) for kind, value in zone.generators]
                made["igen"].append((_SAMPLE, headers.setdefault(header, len(headers))))
    made["shdr"] = list(headers)
    if max(map(len, made.values())) >= 1 << 16:
        raise SoundFontError(f"{path}: the piece needs more of it than the synthesizer can be given: choose another.")
    return _write_soundfont(version, bytes(sound), made)


class _Zone:
    """A sample with how a preset plays it: what the generators of its two levels, `outer` and `inner`, sum up to.

    `total` is the length of all samples, from which `sample`, its header, takes its part. `lead` is what sounds before
    the loop and `cycle` the loop's length, in frames.
    """

    def __init__(self, outer: dict[int, int], inner: dict[int, int], sample: np.void, version: int, total: int):
        def summed(kind: int) -> int:
            return inner.get(kind, 0) + outer.get(kind, 0)

        def both(kind: int) -> tuple[int, int]:  # what two ranges share; the lowest is in a range's lower byte
            ranges = [generators.get(kind, 0x7F00) & 0xFFFF for generators in (outer, inner)]
            return max(r & 0xFF for r in ranges), min(r >> 8 for r in ranges)

        self.keys = both(_KEYS)
        self.version, self.name, self.rate = version, sample["name"], int(sample["rate"])
        start, end, loop, loop_end = (int(sample[field]) for field in ("start", "end", "loop", "loop_end"))
        if version == 2:  # a sample of version 3 is a stream of its own: nothing shifts it, and its loop counts from it
            start += max(summed(0) + 32768 * summed(4), 0)
            end += min(summed(1) + 32768 * summed(12), 0)
            loop += max(summed(2) + 32768 * summed(45), 0) - start
            loop_end += min(summed(3) + 32768 * summed(50), 0) - start
        self.start, self.end = start, min(end, total)
        self.looped = bool(inner.get(_MODE, 0) & 1) and 0 <= loop < loop_end
        self.looped = self.looped and (version == 3 or loop_end <= self.end - start)
        self.lead, self.cycle, self.repeats = loop, loop_end - loop, 1
        if self.looped and version == 2:
            self.repeats = -(-_LOOP_FRAMES // self.cycle)
        elif not self.looped:
            self.lead, self.cycle = (max(self.end - start, 0), _LOOP_FRAMES) if version == 2 else (0, 0)  # see `sound`
        root = inner.get(_ROOT, -1)
        self.root = root if 0 <= root <= 127 else int(sample["root"]) if sample["root"] <= 127 else 60
        self.cents = int(sample["cents"]) + summed(_FINE) + 100 * summed(_COARSE)
        while self.rate > 0xFFFF:  # the synthesizer reads the rate as 16 bits: half the rate, an octave up
            self.rate, self.cents = self.rate // 2, self.cents + 1200
        self.scale = inner.get(_SCALE, 100) + outer.get(_SCALE, 0)  # cents a key
        lowest, highest = both(_VELOCITIES)
        self.generators = [(_VELOCITIES, lowest | highest << 8), (_MODE, int(self.looped or version == 2))]
        for kind, default in _SOUND_KINDS.items():
            # The synthesizer adds a preset's value, which is the default where it states none, as here.
            value = inner.get(kind, default) + outer.get(kind, 0) - default - (_STEEPER if kind == _RELEASE else 0)
            if value != default:
                self.generators.append((kind, value))
        tuned = (self.rate, self.root, self.cents, self.scale)
        self.content = (start, end, loop, loop_end, self.looped, *tuned, summed(_ATTENUATION))

    def runs(self, sample_rate: int) -> Iterator[tuple[int, int, int, int]]:
        """(lowest key, highest key, root key, cents) with which the sample has those keys' pitches, where it can."""
        keys = range(self.keys[0], min(self.keys[1], 127) + 1)
        for tuning, run in groupby(keys, lambda key: self._tuning(key, sample_rate)):
            run = list(run)
            if tuning is not None:
                yield run[0], run[-1], *tuning

    def _tuning(self, key: int, sample_rate: int) -> tuple[int, int] | None:
        if not (0 <= self.start < self.end and self.rate > 0):
            return None
        shift = ((key - self.root) * self.scale + self.cents) / 100  # semitones above the sample as recorded
        root, cents = key - round(shift), round(100 * (shift - round(shift)))
        if not 0 <= root <= 127:
            return None
        ratio = 2 ** (-shift / 12) * sample_rate / self.rate  # frames of output for one of the sample
        too_high = self.scale == 100 and 440 * 2 ** ((key - 69) / 12) >= sample_rate / 2
        if ratio < 2 / _BEYOND or (self.looped and (too_high or self.repeats * self.cycle * ratio < 2)):
            return None
        return root, cents

    def sound(self, samples: np.ndarray) -> bytes:
        """The sample's data: the lead, the repeated loop, and what resampling looks for beyond its end.

        A sample that is played once loops over silence: without a loop the synthesizer would stop it where the decay
        begins, mostly after three milliseconds. The streams of version 3 are left as they are.
        """
        if self.version == 3:
            return samples[self.start : self.end].tobytes()
        lead, rest = np.split(samples[self.start : self.end], [self.lead])
        loop = rest[: self.cycle] if self.looped else np.zeros(self.cycle, rest.dtype)
        return np.concatenate([lead, np.tile(loop, self.repeats), np.resize(loop, _BEYOND)]).tobytes()

    def header(self, start: int, root: int, cents: int) -> tuple:
        """The sample's header where its data begins at `start`."""
        if self.version == 3:
            end, loop, loop_end = start + self.end - self.start, self.lead, self.lead + self.cycle
        else:
            loop, loop_end = start + self.lead, start + self.lead + self.repeats * self.cycle
            end = loop_end + _BEYOND
        return self.name, start, end, loop, loop_end, self.rate, root, cents, 0, 1


def _zones(tables: dict[str, np.ndarray], preset: int, version: int, total: int) -> Iterator[_Zone]:
    """The zones of the preset of that index, in the SoundFont's order."""
    for outer in _bags(tables["phdr"], preset, tables["pbag"], tables["pgen"], _INSTRUMENT):
        if outer[_INSTRUMENT] & 0xFFFF < len(tables["inst"]) - 1:
            for inner in _bags(tables["inst"], outer[_INSTRUMENT] & 0xFFFF, tables["ibag"], tables["igen"], _SAMPLE):
                if inner[_SAMPLE] & 0xFFFF < len(tables["shdr"]) - 1:
                    yield _Zone(outer, inner, tables["shdr"][inner[_SAMPLE] & 0xFFFF], version, total)


def _bags(owners: np.ndarray, index: int, bags: np.ndarray, generators: np.ndarray, last: int) -> Iterator[dict]:
    """Generators by kind of each zone of `owners[index]`, those of its global zone included."""
    shared = {}
    first, end = int(owners["first"][index]), int(owners["first"][index + 1])
    for bag in range(first, min(end, len(bags) - 1)):
        records = generators[int(bags["first"][bag]) : int(bags["first"][bag + 1])]
        zone = shared | dict(zip(records["kind"].tolist(), records["value"].astype("<i2").tolist(), strict=True))
        if last in zone:
            yield zone
        elif bag == first:
            shared = zone


def _read_soundfont(path: Path) -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
    """Version (2, or 3 with Ogg streams for samples), samples (16 bits of version 2, bytes of 3), tables by name.

    Raises:
        SoundFontError: it is not a SoundFont.
    """
    chunks, at = {}, 0
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    while at + 8 <= len(data):
        name, size = data[at : at + 4].tobytes(), int.from_bytes(data[at + 4 : at + 8].tobytes(), "little")
        if name in (b"RIFF", b"LIST"):
            at += 12  # on to what it holds
        else:
            chunks[name.decode("latin-1")] = data[at + 8 : at + 8 + size]
            at += 8 + size
            if size % 2 and not data[at : at + 1].any():
                at += 1  # a zero fills up an odd chunk; not every writer adds it
    tables = {}
    for name, dtype in _TABLES.items():
        chunk = chunks.get(name, data[:0])
        tables[name] = np.frombuffer(chunk[: len(chunk) // dtype.itemsize * dtype.itemsize].tobytes(), dtype)
    version = int(chunks["ifil"][0]) if len(chunks.get("ifil", ())) else 0
    if version not in (2, 3) or "smpl" not in chunks or not all(map(len, tables.values())):
        raise SoundFontError(f"{path} is not a SoundFont of version 2 or 3, or it is cut short.")
    samples = chunks["smpl"]
    return version, samples[: len(samples) // 2 * 2].view("<i2") if version == 2 else samples, tables


def _write_soundfont(version: int, sound: bytes, made: dict[str, list[tuple]]) -> bytes:
    """A SoundFont of `sound` and the tables `made`, whose closing records are added here."""

    def chunk(name: str, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return name.encode() + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)

    tables = []
    for name, dtype in _TABLES.items():
        closing = np.zeros(1, dtype)
        if name in _OWNED:
            closing["first"] = len(made[_OWNED[name]])
        tables.append(chunk(name, np.array(made[name], dtype).tobytes(), closing.tobytes()))
    return chunk(
        "RIFF",
        b"sfbk",
        chunk("LIST", b"INFO", chunk("ifil", version.to_bytes(2, "little") + b"\0\0")),
        chunk("LIST", b"sdta", chunk("smpl", sound + b"\0" * (len(sound) % 2))),
        chunk("LIST", b"pdta", *tables),
    )
