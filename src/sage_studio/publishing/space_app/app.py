"""The Space: continue a MIDI file in the browser.

    python app.py

Runs where the package is installed, and where only its wheel, and that of weights, lie beside this file: in a Space,
whose build sees requirements.txt before the other files are there. `models.json`, a list of checkpoints, replaces the
bundled ones that are installed.
"""

import base64
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent

PACKAGE = None  # where the wheels were unpacked
if find_spec("sage_studio") is None:
    PACKAGE = tempfile.mkdtemp(prefix="sage-music-package-")
    for wheel in HERE.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(PACKAGE)
    sys.path.insert(0, PACKAGE)

# One folder for what visitors send and get, readable by this user alone. It is served, swept and deleted: never the
# folder itself that the variable names, which may hold other files. Both must be set before gradio is imported.
BASE = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
os.makedirs(BASE, exist_ok=True)
FILES = Path(tempfile.mkdtemp(prefix="sage-music-space-", dir=BASE)).absolute()
os.environ["GRADIO_TEMP_DIR"] = str(FILES)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402
import safehttpx  # noqa: E402
from files import sweep_forever  # noqa: E402
from music import (  # noqa: E402
    MAX_BARS,
    MAX_BYTES,
    MAX_PROMPT_BARS,
    MAX_PROMPT_SECONDS,
    MAX_SECONDS,
    Settings,
    Snapshot,
    Writing,
    prompt_roll,
    read_prompt,
)
from roll import draw  # noqa: E402

import sage_studio  # noqa: E402
from sage_studio.checkpoints.loading import BUNDLED, load  # noqa: E402
from sage_studio.errors import MissingExtraError  # noqa: E402
from sage_studio.families import family_of  # noqa: E402
from sage_studio.music.notes import INSTRUMENTS  # noqa: E402
from sage_studio.music.render import render_wav  # noqa: E402

KEEP_SECONDS = 3600  # how long a visitor's files stay
KEEP_SESSIONS = 100  # whose pages stay in memory: Gradio keeps what a page shows, up to 1 MB, until others push it out
WAITING = 16  # visitors in the queue; more are told to come again
END_SECONDS = 5.0  # the longest wait for music that is being written when the server ends

EXAMPLES = {path.stem.replace("_", " ").capitalize(): path for path in sorted(sage_studio.EXAMPLES.glob("*.mid"))}
FIRST = next(iter(EXAMPLES))
PROGRAMS = [("Drums", -1), *((f"{name} ({program})", program) for program, name in enumerate(INSTRUMENTS))]

# What Gradio leaves without a name for screen readers.
NAME_GROUPS = """() => {
    for (const group of document.querySelectorAll("fieldset")) {
        group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").innerText);
    }
    document.querySelectorAll("#programs svg").forEach((arrow) => arrow.setAttribute("aria-hidden", "true"));
}"""

MODELS = {}  # label: (model, tokenizer), in the order the page offers them
RUNNING: dict[str, Writing] = {}  # by session: what a visitor's Stop button stops
ENDING = threading.Event()  # the server is about to end: what begins now is stopped, and no sound is written


async def fetch_nothing(*args, **options):
    raise ValueError("This page fetches nothing from other hosts.")


# Gradio fetches an address that a forged request puts in the place of a file, in any field of a page or behind `file=`,
# and asks a public name server about it. These are all its ways out.
safehttpx.get = safehttpx.async_validate_url = fetch_nothing


def load_models() -> None:
    """Load what the page offers, once, before the first visitor comes."""
    chosen = HERE / "models.json"
    installed = [name for name, folder in BUNDLED.items() if folder.is_dir()]
    names = json.loads(chosen.read_text(encoding="utf-8")) if chosen.is_file() else installed
    for name in names:
        model, tokenizer = load(name)
        family = "{0.name}, {0.plays}".format(family_of(model))
        MODELS[family if name in BUNDLED else f"{family} ({name})"] = (model, tokenizer)


def counts_bars(model_name: str) -> bool:
    return family_of(MODELS[model_name][0]).counts_bars


# ---- what the page does


def prompt_of(example: str | None, uploaded: tuple[str, bytes] | None) -> tuple[str, bytes]:
    """Name and bytes of what is to be continued."""
    if example is not None:
        return EXAMPLES[example].name, EXAMPLES[example].read_bytes()
    if uploaded is None:
        raise ValueError("Your file is no longer kept here: upload it again, or choose an example.")
    return uploaded


def show(example, uploaded, model_name: str, prompt_bars, bars, prompt_seconds, seconds) -> str:
    """The roll of a prompt."""
    name, data = prompt_of(example, uploaded)
    in_bars = counts_bars(model_name)
    lengths = (prompt_bars, bars) if in_bars else (prompt_seconds, seconds)
    return draw(prompt_roll(read_prompt(data, name), in_bars, *lengths))


def preview(who: gr.Request, made: str, example, uploaded, *shown_by):
    """The prompt's roll after other lengths were chosen, unless there is music to look at."""
    if made or who.session_hash in RUNNING:
        return gr.skip()
    return show(example, uploaded, *shown_by)


def choose(example: str, *shown_by) -> dict:
    """An example was picked."""
    return {upload: None, roll: show(example, None, *shown_by), **_ready(example), result: ""}


def take(file: str | None, *shown_by) -> dict:
    """A visitor's own file; a bad one leaves everything as it was."""
    if file is None:
        return {roll: gr.skip()}
    name = Path(file).name
    try:
        if Path(name).suffix.lower() not in (".mid", ".midi"):
            raise ValueError(f"{name}: not a .mid or .midi file.")
        data = Path(file).read_bytes()
        picture = show(None, (name, data), *shown_by)
    except (ValueError, OSError) as error:
        return {status: _alert(error)}
    return {upload: (name, data), example: None, roll: picture, **_ready(name), result: ""}


def switch(example, uploaded, model_name: str, *lengths) -> dict:
    """The other family: other units, and instruments or not."""
    in_bars = counts_bars(model_name)
    return {
        for_bars: gr.update(visible=in_bars),
        for_seconds: gr.update(visible=not in_bars),
        roll: show(example, uploaded, model_name, *lengths),
        result: "",
    }


def generate(
    example,
    uploaded,
    model_name,
    prompt_bars,
    bars,
    prompt_seconds,
    seconds,
    programs,
    temperature,
    top_p,
    seed,
    who: gr.Request,
):
    """Write the continuation, showing it as it grows."""
    model, tokenizer = MODELS[model_name]
    in_bars = counts_bars(model_name)
    try:
        seed = secrets.randbelow(2**31) if not seed.strip() else _whole_number(seed)
        settings = Settings(
            prompt_bars if in_bars else prompt_seconds,
            bars if in_bars else seconds,
            programs if in_bars else [],
            temperature,
            top_p,
            seed,
        )
        name, data = prompt_of(example, uploaded)
        score = read_prompt(data, name)
        writing = Writing(model, tokenizer, score, settings)
        RUNNING[who.session_hash] = writing
        if ENDING.is_set():
            writing.cancel()
        yield {
            status: _say("Listening to the prompt …"),
            spoken: "Writing. The Stop button ends it.",
            result: "",
            stop: gr.update(interactive=True),
        }
        for snapshot in writing:
            if snapshot.piece is None:
                yield {
                    roll: draw(snapshot.roll),
                    status: _say(f"Writing {snapshot.place}, {snapshot.new_notes} notes …"),
                }
        if ENDING.is_set():
            return
        yield {roll: draw(snapshot.roll), status: _say("Rendering the sound …"), stop: gr.update(interactive=False)}
        page, remarks = _result(snapshot, name)
        made = f"{snapshot.place}, {snapshot.new_notes} new notes, in {snapshot.piece.elapsed_s:.1f} s. Seed {seed}."
        yield {status: _say(made, remarks), spoken: _say(made, remarks), result: page}
    except ValueError as error:
        yield {status: _alert(error), stop: gr.update(interactive=False)}
    except Exception:  # the visitor must not wait for what will never come; the log has the rest
        traceback.print_exc()
        failed = RuntimeError("Something went wrong on this side. Try again, or with another file.")
        yield {status: _alert(failed), stop: gr.update(interactive=False)}
    finally:
        RUNNING.pop(who.session_hash, None)


def cancel(who: gr.Request) -> None:
    """Stop what this session is writing: its Stop button, or its page is gone."""
    writing = RUNNING.get(who.session_hash)
    if writing is not None:
        writing.cancel()


def end() -> None:
    """Stop all music, and wait for it for a moment: a thread that writes keeps the process, and its sound's folder."""
    ENDING.set()
    for writing in list(RUNNING.values()):
        writing.cancel()
    until = time.monotonic() + END_SECONDS
    while RUNNING and time.monotonic() < until:
        time.sleep(0.05)


def _result(snapshot: Snapshot, name: str) -> tuple[str, list[str]]:
    """Player and downloads, and the remarks. The MIDI file is in the page itself; only the sound is a file here."""
    piece, stem = snapshot.piece, f"{Path(name).stem}-continued"
    remarks = list(piece.remarks)
    midi = base64.b64encode(piece.score.dumps_midi()).decode()
    links = f'<a class="download" download="{escape(stem)}.mid" href="data:audio/midi;base64,{midi}">Download MIDI</a>'
    player = ""
    try:
        # Whoever knows this address can hear the piece; nobody can guess 32 random bytes.
        sound = render_wav(FILES / secrets.token_urlsafe(32) / "continuation.wav", piece.score)
    except MissingExtraError as error:
        remarks.append(str(error))
    else:
        address = f"gradio_api/file={sound}"
        start = snapshot.roll.prompt_end_s
        player = (
            f'<audio controls preload="metadata" src="{address}" aria-label="The piece, prompt and new music"></audio>'
        )
        links = (
            f'<button type="button" data-seek="{start:.3f}">Play the new music</button>{links}'
            f'<a class="download" download="{escape(stem)}.wav" href="{address}">Download sound</a>'
        )
    return f'{player}<div class="links">{links}</div>', remarks


def _ready(name: str) -> dict:
    return {status: _say(f"{name}: ready."), spoken: _say(f"{name}: ready.")}


def _whole_number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"Seed {text!r}: write a whole number, or nothing for a new seed each time.")
    return int(text)


def _say(text: str, remarks: list[str] | tuple = ()) -> str:
    notes = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    return f"<p>{escape(text)}</p>" + (f"<ul>{notes}</ul>" if notes else "")


def _alert(error: Exception) -> str:
    return f'<p class="alert" role="alert">{escape(str(error))}</p>'


# ---- the page

load_models()
slider = partial(gr.Slider, buttons=[])

with gr.Blocks(title="Continue a MIDI file", analytics_enabled=False) as demo:
    upload = gr.State(None, time_to_live=KEEP_SECONDS)  # name and bytes of the visitor's own file
    gr.HTML(
        "<header><h1>Continue a MIDI file</h1><p>A few bars go in; a small language model goes on from there, note by "
        "note, on a CPU. Everything it writes is valid MIDI.</p></header>",
        elem_id="masthead",
    )
    with gr.Row(elem_id="desk"):
        with gr.Column(scale=4, min_width=300, elem_id="controls"):
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Prompt", elem_id="example")
            file = gr.UploadButton(
                "Upload a MIDI file (up to 1 MB)", file_types=[".mid", ".midi"], elem_id="upload", size="md"
            )
            family = gr.Radio(list(MODELS), value=next(iter(MODELS)), label="Model", elem_id="family")
            in_bars = counts_bars(family.value)
            with gr.Group(visible=in_bars, elem_id="for-bars") as for_bars:
                prompt_bars = slider(1, MAX_PROMPT_BARS, 4, step=1, label="Bars of prompt", elem_id="prompt-bars")
                bars = slider(1, MAX_BARS, 8, step=1, label="New bars", elem_id="bars")
                own = "Those of the prompt where none is chosen."
                programs = gr.Dropdown(
                    PROGRAMS, value=[], multiselect=True, label="Instruments", info=own, elem_id="programs"
                )
            with gr.Group(visible=not in_bars, elem_id="for-seconds") as for_seconds:
                prompt_seconds = slider(
                    1, MAX_PROMPT_SECONDS, 10, step=1, label="Seconds of prompt", elem_id="prompt-seconds"
                )
                seconds = slider(1, MAX_SECONDS, 20, step=1, label="New seconds", elem_id="seconds")
            with gr.Group():
                bold = "0: the likeliest; higher: bolder."
                temperature = slider(0, 1.5, 0.9, step=0.05, label="Temperature", info=bold, elem_id="temperature")
                share = "Share of the probability to draw from."
                top_p = slider(0.05, 1, 0.95, step=0.05, label="Top-p", info=share, elem_id="top-p")
                # A number field cannot be empty.
                same = "Same seed, same music; empty: a new one."
                seed = gr.Textbox("", label="Seed", info=same, max_length=19, elem_id="seed")
        with gr.Column(scale=9, min_width=320, elem_id="stage"):
            with gr.Row(elem_id="buttons"):
                start = gr.Button("Continue the music", variant="primary", elem_id="start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            status = gr.HTML(_say(f"{FIRST}: ready."), elem_id="status")
            # What a screen reader says by itself: beginning and end, not every bar. Kept in the page, so that it does.
            spoken = gr.HTML("", elem_id="spoken", js_on_load="element.setAttribute('role', 'status');")
            lengths = (prompt_bars, bars, prompt_seconds, seconds)
            roll = gr.HTML(
                show(FIRST, None, family.value, *(slider.value for slider in lengths)),
                elem_id="roll",
                js_on_load=(HERE / "roll.js").read_text(encoding="utf-8"),
            )
            result = gr.HTML("", elem_id="result")

    shown_by = [family, *lengths]
    quick = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    example.input(choose, [example, *shown_by], [upload, roll, status, spoken, result], **quick)
    file.upload(take, [file, *shown_by], [upload, example, roll, status, spoken, result], **quick)
    family.input(switch, [example, upload, *shown_by], [for_bars, for_seconds, roll, result], **quick)
    gr.on([slider.change for slider in lengths], preview, [result, example, upload, *shown_by], roll, **quick)
    start.click(
        generate,
        [example, upload, *shown_by, programs, temperature, top_p, seed],
        [roll, status, spoken, result, stop],
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
        concurrency_limit=1,
        trigger_mode="once",
    )
    to_start = "() => document.getElementById('start').focus()"  # a button that is switched off loses the focus
    stop.click(cancel, js=to_start, queue=False, show_progress="hidden", api_visibility="private")
    demo.unload(cancel)
    demo.load(js=NAME_GROUPS, api_visibility="private")

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.amber,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_sm,
    # Of the weights that Gradio brings along, the half bold one lacks most letters.
    font=[gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_text_color_subdued="#5f574c",
    body_text_color_subdued_dark="#b8b0a2",
    block_label_text_color="#3b362e",
    block_title_text_color="#3b362e",
    block_title_text_weight="600",
    block_info_text_color="#5f574c",
    block_info_text_color_dark="#b8b0a2",
    button_primary_background_fill="#8f4f00",
    button_primary_background_fill_dark="#f0a73c",
    button_primary_background_fill_hover="#733f00",
    button_primary_background_fill_hover_dark="#ffbf5e",
    button_primary_text_color="#ffffff",
    button_primary_text_color_dark="#1b1408",
    checkbox_background_color_selected="#a05a00",
    checkbox_border_color_selected="#a05a00",
    checkbox_label_background_fill_selected="#f6eed9",
    checkbox_label_background_fill_selected_dark="#3a3120",
    slider_color="#a05a00",
    slider_color_dark="#f0a73c",
)


def main() -> None:
    threading.Thread(target=sweep_forever, args=(FILES, KEEP_SECONDS), name="sweep", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that files are deleted then, too
    demo.queue(max_size=WAITING, api_open=False)
    try:
        demo.launch(
            theme=THEME,
            css_paths=HERE / "style.css",
            head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            max_file_size=MAX_BYTES,
            state_session_capacity=KEEP_SESSIONS,
            footer_links=[],
            run_history=False,
            share=False,
            ssr_mode=False,
        )
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not keep the files
        end()
        for folder in filter(None, (FILES, PACKAGE)):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
