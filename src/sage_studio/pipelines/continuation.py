"""The `midi-continuation` pipeline of both families: inputs, options, batches, seeds, the result."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, ClassVar

import numpy as np
import torch
from symusic import Score
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from sage_studio.errors import InvalidMidiError
from sage_studio.families import Family, family_of
from sage_studio.generation.result import Piece, Plan
from sage_studio.generation.sampling import TURN
from sage_studio.music.midi import notes_from_score
from sage_studio.music.render import find_soundfont, synthesize

SAMPLE_RATES = (8_000, 192_000)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_seed(value) -> bool:
    return _is_whole(value) and -(2**63) <= value < 2**63


def _plain(value):
    """NumPy's numbers and arrays as Python's, those in a list too."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


# Kinds of options: a check, and how to say what passes it.
KINDS = {
    "count": (lambda value: _is_whole(value) and value > 0, "a whole number from 1"),
    "number": (_is_number, "a number"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "programs": (
        lambda value: isinstance(value, list | tuple) and all(map(_is_whole, value)),
        "a list of program numbers",
    ),
    "mapping": (lambda value: isinstance(value, dict), "a dictionary"),
    "seed": (
        lambda value: _is_seed(value) or (isinstance(value, list | tuple) and all(map(_is_seed, value))),
        "a whole number from -2**63 to 2**63 - 1, or a list of one for each input",
    ),
    "sample rate": (
        lambda value: _is_whole(value) and SAMPLE_RATES[0] <= value <= SAMPLE_RATES[1],
        "a whole number from {:,} to {:,}".format(*SAMPLE_RATES),
    ),
}
# Options of both families, by the step that takes them.
BOTH = {"temperature": "number", "top_p": "number", "seed": "seed", "time_limit": "number"}
RESULT = {"audio": "flag", "sample_rate": "sample rate"}


class ContinuationPipeline(Pipeline):
    """Continues MIDI files: a path, bytes or a `symusic.Score` in, MIDI bytes and notes (and sound) out.

    A list gives a list; a generator, a dataset or a column of one gives an iterator. `batch_size=n` writes n prompts at
    once, each with its own seed: of a list with `seed=s`, item i is what it alone is with `seed=s + i` (-2**63 follows
    2**63 - 1). A list of seeds has one for each item. Without a seed one is drawn from torch's generator.

    Options, as arguments of a call, or of `pipeline()` for all calls; None leaves one to its default:
        prompt_bars, bars: SAGE-Music: bars of the prompt to hear (4), and bars to write (16).
        free: SAGE-Music: let the model bring in instruments, meters and tempos that the prompt does not have (false).
        programs: SAGE-Music: the only General MIDI programs to use (-1: drums), instead of the prompt's.
        generate_options: SAGE-Music: more options of `generate()`, such as `{"use_mtp": True}`, but none that the piece
            has already (its length, its rules, beams); a batch is then written one by one.
        prompt_s, music_s: PerceiverS: seconds of the prompt to hear (20), and seconds to write (60); `music_s=None`
            lets `max_tokens` or the model end the piece.
        max_tokens: PerceiverS: tokens to write at most.
        max_note_s: PerceiverS: seconds after which a note is ended (6); None leaves that to the model.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same music; of several inputs the i-th gets `seed + i`, or the i-th of a list.
        time_limit: seconds of wall time for the generation of one batch; what is not finished then ends there (music in
            bars with its last whole bar), and `remarks` says so. Waiting for other threads does not count.
        audio, sample_rate: render sound too (false), in so many samples a second (44,100).

    One process generates one batch at a time, whichever thread asks. Of a batch, PerceiverS writes at once those whose
    prompts have equally many tokens, as several seeds for one prompt; others go one by one, because padding would
    change what it hears.

    Result of one input, a dictionary:
        midi: bytes of a Standard MIDI file, prompt and new music.
        notes: note array (`sage_studio.music.notes`) of the whole.
        prompt_end_s: seconds at which the new music begins.
        new_notes: their number.
        elapsed_s: seconds of wall time of the generation, of the whole batch.
        seed: with it the same call gives the same music.
        remarks: sentences about what was changed or left out on the way.
        audio, sampling_rate: with `audio=True`, float32 of shape (2, samples), and `sample_rate`.

    Raises:
        InvalidMidiError: an input that cannot be read.
        ValueError: an option that the family does not have, or out of range; an input that is none of the above, or
            that the model cannot continue. Of several inputs, `inputs[i]` says which, here and above.
        MissingExtraError: audio is asked for, and there is no SoundFont; before anything is generated.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    family: ClassVar[Family]
    plan: ClassVar[Callable[..., Plan]]  # of a continuation
    together: ClassVar[Callable[[list[Plan]], list[Piece]]]  # writes plans whose options, seeds aside, are equal

    def __init__(self, model, tokenizer=None, **kwargs):
        if family_of(model) != self.family:
            raise ValueError(f"this pipeline is {self.family.name}'s; the model is {family_of(model).name}'s.")
        if tokenizer is None:
            raise ValueError("midi-continuation needs the model's tokenizer: pipeline(..., tokenizer=tokenizer).")
        kwargs.pop("local_files_only", None)  # `pipeline()` has heeded it, and hands it on
        super().__init__(model, tokenizer, **kwargs)
        for info in (getattr(model.config, "custom_pipelines", None) or {}).values():
            # `pipeline()` puts classes here, which no config could be saved with.
            info["pt"] = [name if isinstance(name, str) else name.__name__ for name in info.get("pt", ())]

    # ---- options

    def _sanitize_parameters(self, **given) -> tuple[dict, dict, dict]:
        own = self.family.options
        known = {**{name: option.kind for name, option in own.items()}, **BOTH, **RESULT}
        given = {name: _plain(value) for name, value in given.items()}
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"midi-continuation of {self.family.name} has no option {name!r}, but {', '.join(known)}."
                )
            passes, kind = KINDS[known[name]]
            if value is None and (name in BOTH or (name in own and own[name].nullable)):
                continue
            if not passes(value):
                raise ValueError(f"{name} must be {kind}, not {value!r}.")
        if given.get("audio"):
            find_soundfont()
        result = {name: given.pop(name) for name in RESULT if name in given}
        return given, {}, result

    # ---- inputs

    def __call__(self, inputs, num_workers: int | None = None, batch_size: int | None = None, **options):
        """Continue one input, or each of several; see the class.

        Args:
            inputs: path, bytes or score, or a list, generator, dataset or column of these.
            num_workers: without effect: prompts are read in the thread that writes.
            batch_size: how many to write at once, 1 by default.
        """
        batch_size = _plain(batch_size)
        size = self._batch_size if batch_size is None else batch_size
        if size is not None and not (_is_whole(size) and size > 0):
            raise ValueError(f"batch_size must be a whole number from 1, not {size!r}.")
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
            if not inputs:
                return []
        elif isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
            inputs = (item for item in map(inputs.__getitem__, range(len(inputs))))
        elif isinstance(inputs, Iterable) and not (_is_one(inputs) or isinstance(inputs, Mapping)):
            inputs = (item for item in inputs)  # Transformers streams generators, but not every iterable
        return super().__call__(inputs, num_workers=0, batch_size=batch_size, **options)

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict]:
        """Results of several inputs, `batch_size` written at a time.

        Transformers would stack prompts into tensors and read them in other processes. Here a batch is a list of plans,
        which hold what each row of `generate()` needs.
        """
        seeds = preprocess_params.get("seed")
        total = len(inputs) if isinstance(inputs, list) else None
        given = isinstance(seeds, list | tuple)
        if given:
            if total not in (None, len(seeds)):
                raise ValueError(f"seed holds {len(seeds)} seeds for {total} inputs: give one for each.")
            seeds = iter(seeds)
        else:
            first = self._draw_seed() if seeds is None else seeds
            seeds = ((seed + 2**63) % 2**64 - 2**63 for seed in count(first))  # 64 bits, as a call takes them
        items = enumerate(inputs)
        while batch := list(islice(items, batch_size)):
            plans = []
            for index, item in batch:
                seed = next(seeds, None)
                if seed is None:
                    raise ValueError(f"seed holds {index} seeds, and there are more inputs: give one for each.")
                try:
                    plans += self.preprocess(item, **{**preprocess_params, "seed": seed})["plans"]
                except InvalidMidiError as error:
                    raise InvalidMidiError(f"inputs[{index}]", str(error)) if total != 1 else error from error
                except ValueError as error:
                    raise ValueError(f"inputs[{index}]: {error}") if total != 1 else error from error
            outputs = self.forward({"plans": plans}, **forward_params)
            for music, seed in zip(outputs["music"], outputs["seeds"], strict=True):
                yield self.postprocess({"music": [music], "seeds": [seed]}, **postprocess_params)
        if given and next(seeds, None) is not None:
            raise ValueError("seed holds more seeds than there are inputs: give one for each.")

    def _draw_seed(self) -> int:
        with TURN:  # or the numbers that another thread's music is made of would change
            return int(torch.randint(2**31, ()))

    def preprocess(self, inputs, seed: int | list[int] | None = None, **options) -> dict[str, Any]:
        """`plans` of one input: read, checked and made tokens."""
        if isinstance(seed, list | tuple):
            if len(seed) != 1:
                raise ValueError(f"seed holds {len(seed)} seeds for one input: give one for each.")
            (seed,) = seed
        if not _is_one(inputs):
            raise ValueError(f"inputs must be a path, bytes or a symusic.Score, not {type(inputs).__name__}.")
        if isinstance(inputs, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", inputs):
            raise ValueError(f"{inputs}: addresses are not fetched; read the file, and pass its path or its bytes.")
        if isinstance(inputs, bytearray | memoryview):
            inputs = bytes(inputs)
        elif isinstance(inputs, Score):
            inputs = inputs.to("tick")
            if not inputs.note_num():
                raise InvalidMidiError("<score>", "it holds no notes.")
        seed = self._draw_seed() if seed is None else seed
        return {"plans": [self.plan(self.model, self.tokenizer, inputs, seed=seed, **options)]}

    # ---- music

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        plans = model_inputs["plans"]
        return {"music": self.together(plans), "seeds": [plan.seed for plan in plans]}

    def postprocess(self, model_outputs: dict[str, Any], audio: bool = False, sample_rate: int = 44100) -> dict:
        """The result of one input; see the class."""
        (music,), (seed,) = model_outputs["music"], model_outputs["seeds"]
        result = {
            "midi": music.score.dumps_midi(),
            "notes": notes_from_score(music.score),
            "prompt_end_s": music.prompt_end_s,
            "new_notes": music.notes,
            "elapsed_s": music.elapsed_s,
            "seed": seed,
            "remarks": music.remarks,
        }
        if audio:
            result |= {"audio": synthesize(music.score, sample_rate), "sampling_rate": sample_rate}
        return result

    # ---- saving

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save model and tokenizer; and the code, where it came with the model and not from an installed package."""
        if type(self).__module__.startswith("transformers_modules."):
            module = type(self).__module__.rpartition(".")[2]
            info = {"impl": f"{module}.{type(self).__name__}", "pt": ["AutoModelForCausalLM"], "tf": [], "type": "text"}
            self.model.config.custom_pipelines = {"midi-continuation": info}
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)


def _is_one(inputs) -> bool:
    """Whether this is one input; what else can be iterated holds several."""
    # Score is no class, but knows its instances.
    return isinstance(inputs, str | os.PathLike | bytes | bytearray | memoryview) or isinstance(inputs, Score)
