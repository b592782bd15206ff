"""The YAML at the head of a card: licence, tags, results as a model index, examples for the Hub's widget.

The task is `text-generation`, which is what the files are for the Hub: a causal language model whose tokens are text.
The custom task `midi-continuation` is none that the Hub knows; it stands in `config.json` and among the tags. Training
data are described in the card's text: none of the sources is a dataset of the Hub.
"""

from huggingface_hub import EvalResult, ModelCardData

from sage_studio import example

from .facts import Checkpoint, row_of

TASK = "text-generation"
WIDGET_TOKENS = 512  # the widget's new tokens


def metadata(checkpoint: Checkpoint, results: dict[str, dict]) -> ModelCardData:
    """The metadata of a bundled checkpoint's card; `results` by task, as `model_cards.build.gather` has them."""
    tags, found, widget = CARDS[checkpoint.name]
    return ModelCardData(
        license=checkpoint.family.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["midi", "midi-continuation", "music", "music-generation", "symbolic-music", *tags],
        model_name=checkpoint.name,
        eval_results=found(results),
        widget=widget(checkpoint),
        inference={
            "parameters": {
                "do_sample": checkpoint.generation["do_sample"],
                "temperature": checkpoint.generation["temperature"],
                "top_p": checkpoint.generation["top_p"],
                "max_new_tokens": WIDGET_TOKENS,
            }
        },
    )


def _sage_results(results: dict[str, dict]) -> list[EvalResult]:
    continuation, likelihood = results["continuation"], results["likelihood"]
    ours = row_of(continuation, "sage-music")
    parts = {
        "chroma": "chroma similarity",
        "groove": "groove similarity",
        "self_similarity": "self-similarity",
        "note_density": "note density similarity",
    }
    dataset = (
        "multitrack",
        "Multi-track MIDI (POP909, OpenScore, Nottingham and others)",
        continuation["settings"]["split"],
    )
    settings = continuation["settings"]
    task = f"Continuation of {settings['prompt_bars']} bars by {settings['bars']}"
    found = [_result(task, dataset, "nmsi", "NMSI", ours["nmsi"], 2)]
    found += [_result(task, dataset, key, text, ours[key], 3) for key, text in parts.items()]
    nats = row_of(likelihood, "sage-music")["nats_per_note"]
    return [*found, _result("Likelihood", dataset, "nats_per_note", "nats per note", nats, 3)]


def _perceivers_results(results: dict[str, dict]) -> list[EvalResult]:
    sets, likelihood = results["set"], results["likelihood"]
    dataset = ("asap", "ASAP piano performances", sets["settings"]["split"])
    mean = sets["features"]["perceivers"]["mean"]
    written = row_of(sets, "perceivers")["n"]
    area = {"mean": mean["oa"], "low": mean["oa_low"], "high": mean["oa_high"], "n": written}
    nats = row_of(likelihood, "perceivers")["nats_per_note"]
    task = f"Pieces of {sets['settings']['music_s']:g} s from nothing"
    return [
        _result(task, dataset, "overlap_area", "mean Overlap Area of 13 features", area, 3),
        _result("Likelihood", dataset, "nats_per_note", "nats per note", nats, 3),
    ]


def _result(task: str, dataset: tuple[str, str, str], metric: str, text: str, found: dict, digits: int) -> EvalResult:
    """A row of the model index; the interval stands in the metric's name, for readers, and in its arguments."""
    low, high = (round(found[key], digits) for key in ("low", "high"))
    return EvalResult(
        task_type=TASK,
        task_name=task,
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        dataset_split=dataset[2],
        metric_type=metric,
        metric_name=f"{text}, 95 % interval {low:.{digits}f} to {high:.{digits}f} (n {found['n']})",
        metric_value=round(found["mean"], digits),
        metric_args={"n": found["n"], "interval_95": [low, high]},
    )


# A text ends with a space: the stock pipeline puts what is new right behind it, and tokens are told apart by spaces.
def _sage_widget(checkpoint: Checkpoint) -> list[dict]:
    tokenizer = checkpoint.family.classes[1].from_pretrained(checkpoint.folder)
    bar = tokenizer.convert_ids_to_tokens(tokenizer.midi_to_ids(example("ode_to_joy"), bars=1))
    return [
        {"example_title": "Ode to Joy, one bar of a band", "text": " ".join(bar) + " "},
        {"example_title": "From nothing, in 3/4", "text": "BOS_None Bar_None TimeSig_3/4 "},
    ]


def _perceivers_widget(checkpoint: Checkpoint) -> list[dict]:
    tokenizer = checkpoint.family.classes[1].from_pretrained(checkpoint.folder)
    chord = ["BOS", "VELOCITY_16", "NOTE_ON_48", "NOTE_ON_55", "NOTE_ON_64", "TIME_SHIFT_500"]
    unknown = set(chord) - set(tokenizer.get_vocab())
    if unknown:
        raise ValueError(
            f"{checkpoint.folder}: its tokenizer has no {', '.join(sorted(unknown))}, which the widget begins with."
        )
    return [
        {"example_title": "A chord of C major", "text": " ".join(chord) + " "},
        {"example_title": "From nothing", "text": "BOS "},
    ]


# Of each card: its tags beside those of all, its results as a model index, the examples of the widget.
CARDS = {
    "sage-music-6m": (("multitrack", "sage-music"), _sage_results, _sage_widget),
    "perceivers-6m": (("piano", "expressive-performance", "perceivers"), _perceivers_results, _perceivers_widget),
}
