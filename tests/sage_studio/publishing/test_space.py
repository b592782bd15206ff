"""The Space in a real browser: the app as its own process on loopback, Chromium driven by Playwright.

SPACE_SCREENSHOTS=docs python -m pytest tests/sage_studio/publishing/test_space.py -k screenshots    # docs/*.png
"""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from sage_studio import EXAMPLES
from sage_studio.music.midi import read_score
from sage_studio.music.notes import note_array

pytestmark = pytest.mark.xdist_group("space")  # one app and one browser for all

ROOT = Path(__file__).resolve().parents[3]
SPACE = ROOT / "src" / "sage_studio" / "publishing" / "space_app"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Keeps every number of notes that the roll shows: whoever asks now and then, on a busy machine, misses some.
COUNTING = """
window.shown = [];
const count = () => {
    const notes = document.querySelector("#roll .roll")?.getAttribute("data-notes");
    if (notes != null && Number(notes) !== window.shown.at(-1)) window.shown.push(Number(notes));
};
const what = {subtree: true, childList: true, attributes: true, attributeFilter: ["data-notes"]};
new MutationObserver(count).observe(document, what);
"""
WAIT = 180_000  # milliseconds, on a busy machine
# As `python app.py`, but that it looks for old files every second.
RUN = """
import runpy, sys
sys.path[0] = sys.argv[1]
import files
files.EVERY_SECONDS = 1
runpy.run_path(sys.argv[1] + "/app.py", run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Trap:
    """Stands in as the proxy to the world outside, and counts who would go there."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.caught: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.caught.append(connection.recv(200))
            connection.close()


class Space:
    """The app as its own process, told to keep its files in a folder where an old file of somebody lies."""

    def __init__(self, folder: Path):
        port, self.folder, self.trap = free_port(), folder, Trap()
        self.url, self.log = f"http://127.0.0.1:{port}/", folder.parent / f"{folder.name}.log"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        outside = {name: self.trap.address for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        settings = {
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        self.thesis = folder / "thesis.tex"
        folder.mkdir()
        self.thesis.write_text("years of work")
        os.utime(self.thesis, (1e9, 1e9))
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(SPACE)],
            env={**os.environ, **outside, **settings},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for _ in range(1500):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            try:
                self.config = json.load(self.open("config"))
                self.files = next(folder.glob("sage-music-space-*"), folder)
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the Space did not start: {self.log.read_text()}")

    def open(self, path: str, body: dict | None = None):
        """The reply to a request without a browser; an error's, too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return self.opener.open(request, timeout=WAIT / 1000)
        except urllib.error.HTTPError as error:
            return error

    def send(self, element: str, trigger: str, data: list, session: str):
        """What the page sends when something is done to an element, or something else. The reply is a stream."""
        source = next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == element)
        event = next(d["id"] for d in self.config["dependencies"] if [source, trigger] in d["targets"])
        body = {"data": data, "fn_index": event, "session_hash": session, "trigger_id": source}
        self.open("gradio_api/queue/join", body)
        return self.open(f"gradio_api/queue/data?session_hash={session}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    space = Space(tmp_path_factory.mktemp("space") / "files")
    yield space
    # Its end comes at once, also in the middle of a long piece, and takes the visitors' files along but no others.
    piece = ["Saints", None, "PerceiverS, a pianist", 4, 1, 10, 60, [], 0.9, 0.95, "1"]
    try:
        replies = space.send("start", "click", piece, "last")
        assert any(b"Writing second" in line for line in replies), space.log.read_text()
    finally:
        space.stop()
    left = [path.name for path in space.folder.iterdir()]
    assert left == ["thesis.tex"], f"{left}: {space.log.read_text()}"


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, space):
    """`visit(**options of a context)`: a page of a new visitor, loaded."""
    contexts, requests = [], []

    def visit(**options):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options)
        contexts.append(context)
        context.add_init_script(COUNTING)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(space.url)
        page.wait_for_selector("#roll svg")
        page.wait_for_selector("#start:not([disabled])")
        return page

    yield visit
    for context in contexts:
        context.close()
    outside = [url for url in requests if not url.startswith((space.url, "data:", "blob:"))]
    assert requests and not outside, "the page must work with no internet"


def set_number(page, field: str, value) -> None:
    page.fill(f"#{field} input[type=number]", str(value))
    page.press(f"#{field} input[type=number]", "Tab")


def notes_shown(page) -> int:
    return int(page.get_attribute("#roll .roll", "data-notes"))


def watch(page, until: str = "#result a.download") -> list[int]:
    """Numbers of notes that the roll has shown since the last call, when `until` has appeared."""
    page.wait_for_selector(until)
    return [*page.evaluate("window.shown.splice(0)"), notes_shown(page)]


def download(page) -> bytes:
    with page.expect_download() as waiting:
        page.click("#result a.download >> text=MIDI")
    assert waiting.value.suggested_filename.endswith("-continued.mid")
    return Path(waiting.value.path()).read_bytes()


def alert(page) -> str:
    return page.wait_for_selector("#status [role=alert]").inner_text()


def test_an_example_is_continued_before_the_visitors_eyes(visit, space):
    from sage_studio.checkpoints import load
    from sage_studio.generation.bars import continue_score

    page = visit()
    page.check("#example >> text=Saints")
    page.wait_for_function("document.querySelector('#roll .legend').innerText.includes('Trumpet')")
    set_number(page, "bars", 4)
    page.fill("#seed textarea, #seed input", "7")
    before = notes_shown(page)
    page.click("#start")
    shown = watch(page)
    between = sorted({count for count in shown if before < count < shown[-1]})
    assert len(between) >= 2, shown
    assert "4 bars" in page.inner_text("#status") and "Seed 7" in page.inner_text("#status")
    assert page.inner_text("#spoken") == page.inner_text("#status")

    expected = continue_score(
        *load(), EXAMPLES / "saints.mid", prompt_bars=4, bars=4, temperature=0.9, top_p=0.95, seed=7
    )
    data = download(page)
    assert data == expected.score.dumps_midi()
    assert read_score(data).note_num() == shown[-1]

    sound = page.evaluate(
        """async () => {
            const audio = document.querySelector("#result audio");
            audio.muted = true;
            await audio.play();
            while (audio.currentTime < 0.2) await new Promise((resolve) => setTimeout(resolve, 50));
            audio.pause();
            return [audio.duration, audio.currentTime, document.querySelector("#roll .playhead").style.left];
        }"""
    )
    assert sound[0] >= float(read_score(data).to("second").end()) - 0.1 and sound[1] > 0.1
    assert float(sound[2].removesuffix("%")) > 0, "the playhead follows the player"
    page.click("#result [data-seek]")
    assert page.evaluate("document.querySelector('#result audio').currentTime") >= expected.prompt_end_s - 0.01
    assert not space.trap.caught, "Gradio must not phone home"


def test_the_roll_shows_the_lengths_that_are_chosen(visit, space):
    page, said = visit(), "document.querySelector('#roll svg').getAttribute('aria-label')"
    for bars in (2, 3):
        set_number(page, "prompt-bars", bars)
        page.wait_for_function(f"{said}.includes('Bars 1 to {bars} are the prompt')")
    set_number(page, "bars", 5)
    page.wait_for_function(f"{said}.includes('5 bars follow')")
    assert "Traceback" not in space.log.read_text(), space.log.read_text()


def test_instruments_and_a_fixed_prompt_length(visit):
    page = visit()
    set_number(page, "bars", 2)
    set_number(page, "prompt-bars", 2)
    page.click("#programs input")
    page.fill("#programs input", "Cello")
    page.press("#programs input", "Enter")
    page.click("#start")
    watch(page)
    score = read_score(download(page))
    cello = [track for track in score.tracks if track.program == 42 and not track.is_drum]
    assert cello and cello[0].note_num() > 0
    # Nothing but the cello after the two bars of prompt.
    others = [track for track in score.tracks if track.program != 42 or track.is_drum]
    assert max(note.time for track in others for note in track.notes) < 8 * score.ticks_per_quarter


def test_the_other_family_counts_seconds(visit):
    from sage_studio.checkpoints import load
    from sage_studio.generation.seconds import continue_performance

    page = visit()
    page.check("#family >> text=PerceiverS")
    page.wait_for_selector("#for-seconds", state="visible")
    assert page.is_hidden("#programs")
    set_number(page, "prompt-seconds", 5)
    set_number(page, "seconds", 8)
    page.fill("#seed textarea, #seed input", "3")
    page.wait_for_function("Math.round(document.querySelector('#roll .roll').dataset.seconds) === 13")
    before = notes_shown(page)
    page.click("#start")
    shown = watch(page)
    assert len({count for count in shown if before < count < shown[-1]}) >= 2, shown
    expected = continue_performance(
        *load("perceivers"),
        EXAMPLES / "greensleeves.mid",
        prompt_s=5,
        music_s=8,
        temperature=0.9,
        top_p=0.95,
        seed=3,
    )
    assert download(page) == expected.score.dumps_midi()


def test_by_keyboard_alone(visit):
    page = visit()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            assert page.evaluate(
                """() => {
                    const style = getComputedStyle(document.activeElement);
                    return document.activeElement === document.body
                        || (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
                }"""
            ), f"no focus to be seen: {page.evaluate('document.activeElement.outerHTML.slice(0, 200)')}"
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab never comes to {selector}")

    tab_to("#example input[value=Saints]")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('Saints')")
    tab_to("#bars input[type=number]")
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    watch(page)
    assert page.inner_text("#status").startswith("2 bars")
    tab_to("#result a[download$='.mid']")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert read_score(Path(waiting.value.path()).read_bytes()).note_num() > 0


def test_everything_has_a_name(visit):
    """What a screen reader calls the controls, and that what changes is said."""
    page = visit()
    tree = page.locator("body").aria_snapshot()
    for role in ("radio", "button", "slider", "spinbutton", "textbox", "combobox", "listbox", "region", "img"):
        found = re.findall(rf"- {role}\b(.*)", tree)
        assert all(re.match(r' "[^"]+"', rest) for rest in found), (role, found)
    for name in ("Prompt", "Model", "New bars", "Instruments", "Temperature", "Top-p", "Seed", "Stop"):
        assert f"{name}" in tree, name
    assert 'img "Piano roll.' in tree and "Cello" in tree
    assert page.get_attribute("#spoken [role]", "role") == "status"


HOSTILE = {
    "<img src=x onerror=alert(1)>.mid": b"not music",
    "empty.mid": b"",
    "cut.mid": (EXAMPLES / "saints.mid").read_bytes()[:-100],
    "silent.mid": b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0MTrk\x00\x00\x00\x04\x00\xff\x2f\x00",
    "${document.title='taken'}{{document}}.mid": b"MThd",
}


def test_hostile_uploads_get_a_message(visit):
    page = visit()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    before, title = notes_shown(page), page.title()
    for name, data in HOSTILE.items():
        page.set_input_files("input[type=file]", {"name": name, "mimeType": "", "buffer": data})
        page.wait_for_selector("#status [role=alert]")
        message = alert(page)
        assert ".mid" in message and len(message) < 200, message
        page.check("#example >> text=Saints")
        page.wait_for_selector("#status [role=alert]", state="detached")
        page.check("#example >> text=Greensleeves")
        page.wait_for_function("document.querySelector('#status').innerText.startsWith('Greensleeves')")
    assert notes_shown(page) == before and page.title() == title and not dialogs
    set_number(page, "bars", 1)
    page.fill("#seed textarea, #seed input", "minus one")
    page.click("#start")
    assert "whole number" in alert(page)
    page.fill("#seed textarea, #seed input", "")
    page.click("#start")
    watch(page)


def test_uploads_have_a_limit(visit):
    page = visit()
    page.set_input_files("input[type=file]", {"name": "long.mid", "mimeType": "", "buffer": b"MThd" + bytes(1_500_000)})
    page.wait_for_function("document.body.innerText.match(/maximum|too large|exceed|1 MB\\\\./i)")
    assert "Greensleeves" in page.inner_text("#status")


def test_an_own_file_is_continued(visit):
    page = visit()
    page.set_input_files("input[type=file]", str(EXAMPLES / "saints.mid"))
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('saints.mid')")
    assert page.query_selector("#example input:checked") is None
    set_number(page, "bars", 1)
    page.click("#start")
    watch(page)
    assert page.get_attribute("#result a.download", "download") == "saints-continued.mid"


def test_stop_ends_the_music_and_keeps_it(visit):
    page = visit()
    set_number(page, "bars", 32)
    page.click("#start")
    page.wait_for_function("/bar [2-9] of 32/.test(document.querySelector('#status').innerText)")
    page.click("#stop")
    watch(page)
    text = page.inner_text("#status")
    assert "cancelled in bar" in text and int(re.match(r"\d+", text)[0]) < 32
    assert read_score(download(page)).note_num() == notes_shown(page)
    assert page.is_disabled("#stop")
    # Nothing of it goes on: the next piece is not kept waiting.
    set_number(page, "bars", 1)
    page.click("#start")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('1 bars')")


def test_a_closed_page_stops_its_music(visit):
    first, second = visit(), visit()
    first.check("#family >> text=PerceiverS")
    first.wait_for_selector("#for-seconds", state="visible")
    set_number(first, "seconds", 300)
    begin = time.monotonic()
    first.click("#start")
    first.wait_for_function("/second ([3-9]|\\d\\d)/.test(document.querySelector('#status').innerText)")
    pace = (time.monotonic() - begin) / 3
    set_number(second, "bars", 1)
    second.click("#start")
    second.wait_for_function("document.querySelector('#status').innerText.includes('queue: 1/1')")
    first.context.close()
    begin = time.monotonic()
    watch(second)
    assert time.monotonic() - begin < 150 * pace, "the closed page's piece goes on"


def test_nobody_gets_anothers_music(visit, space):
    first, second = visit(), visit()
    first.set_input_files("input[type=file]", str(EXAMPLES / "saints.mid"))
    first.wait_for_function("document.querySelector('#status').innerText.startsWith('saints.mid')")
    for page in (first, second):
        set_number(page, "bars", 2)
    first.click("#start")
    watch(first)
    address = first.get_attribute("#result audio", "src")
    secret = Path(address.split("file=")[1])
    assert len(secret.parent.name) >= 43 and secret.is_relative_to(space.files)

    # The second visitor's page, before and after a reload, knows nothing of it; nor does a piece of its own.
    for _ in range(2):
        assert "saints" not in second.content() and not second.query_selector("#result a")
        second.reload()
        second.wait_for_selector("#roll svg")
    set_number(second, "bars", 2)
    second.click("#start")
    watch(second)
    assert download(first) != download(second) and secret.parent.name not in second.content()
    # What can be guessed of its address leads nowhere: no folder is listed, and nothing outside is served.
    guesses = (space.files, secret.parent, space.files / "continuation.wav", SPACE / "app.py", "/etc/passwd")
    for path in (*guesses, space.thesis):
        reply = second.request.get(f"{space.url}gradio_api/file={path}")
        assert reply.status in (403, 404), (path, reply.status)
    config = second.request.get(f"{space.url}config").text()
    assert "saints-continued" not in config and secret.parent.name not in config


# Places in the inputs of "Continue the music", and what is put there.
FORGED = [(4, 1e9), (4, "many"), (3, -4), (7, [999]), (2, "../../etc"), (0, "/etc/passwd"), (8, 1e9), (10, "9" * 400)]


def test_forged_requests_do_no_harm(visit, space):
    """What the page's own controls could never send."""
    page = visit()
    good = ["Saints", None, "SAGE-Music, a band", 4, 1, 10, 20, [], 0.9, 0.95, "1"]
    for place, value in FORGED:
        data = [*good[:place], value, *good[place + 1 :]]
        reply = space.send("start", "click", data, f"forged{place}").read().decode()
        assert "process_completed" in reply and "continuation.wav" not in reply, (place, value, reply[-500:])
    set_number(page, "bars", 1)
    page.click("#start")
    watch(page)
    assert "Traceback" not in page.content()


def test_no_forged_address_is_fetched(space):
    """Nor is anybody asked where it lies. Gradio asks a name server about most addresses, but trusts the Hub's."""
    for address in ("http://huggingface.co/x.mid", "https://hf.co/x.mid", "http://127.0.0.3/x.mid"):
        file = {"path": address, "meta": {"_type": "gradio.FileData"}}
        for index, (element, trigger, data) in enumerate(
            (
                ("upload", "upload", [file, "SAGE-Music, a band", 4, 1, 10, 20]),
                ("start", "click", [file, None, "SAGE-Music, a band", 4, 1, 10, 20, [], 0.9, 0.95, "1"]),
                ("start", "click", ["Saints", None, "SAGE-Music, a band", 4, file, 10, 20, [], 0.9, 0.95, "1"]),
            )
        ):
            reply = space.send(element, trigger, data, f"address{index}").read().decode()
            assert "process_completed" in reply and '"success":false' in reply, (address, element, reply[-500:])
            assert not space.trap.caught, (address, element)
    # Another one: Gradio remembers for a while what it was told.
    assert space.open("gradio_api/file=http://127.0.0.4/x.mid").status == 403
    assert space.open("gradio_api/proxy=http://127.0.0.4/x.mid").status == 400
    assert not space.trap.caught


def test_a_page_does_not_stay_in_memory_for_ever(space):
    """Gradio keeps what a page shows; here, of the last hundred pages. A deep link says whether it still does."""

    def is_kept(session: str) -> bool:
        return len(space.open(f"gradio_api/deep_link?session_hash={session}").read()) > 2

    def come(session: str) -> None:
        body = {"component_id": space.config["components"][0]["id"], "fn_name": "", "session_hash": session, "data": 0}
        space.open("gradio_api/component_server", body)

    come("first")
    assert is_kept("first")
    for index in range(101):
        come(f"other{index}")
    assert not is_kept("first") and is_kept("other100")


def test_only_its_own_old_files_go(space):
    """Every second here. The folder it is told to use is somebody's, and what lies there is older."""
    old = space.files / "old.mid"
    old.write_bytes(b"MThd")
    os.utime(old, (1e9, 1e9))
    begin = time.monotonic()
    while old.exists():
        assert time.monotonic() - begin < WAIT / 1000, "nothing is swept"
        time.sleep(0.1)
    assert space.thesis.read_text() == "years of work"
    assert space.files.parent == space.folder and space.files.stat().st_mode & 0o077 == 0


@pytest.mark.skipif("SPACE_SCREENSHOTS" not in os.environ, reason="makes the pictures of docs/: set SPACE_SCREENSHOTS")
def test_screenshots(visit, tmp_path):
    """The pictures in docs/, in light, dark and on a phone; `SPACE_SCREENSHOTS` says where to write them."""
    folder = Path(os.environ.get("SPACE_SCREENSHOTS", tmp_path))
    for name, example, seed, address in (
        ("light", "Greensleeves", 6, ""),
        ("dark", "Ode to joy", 3, "?__theme=dark"),
        ("phone", "Greensleeves", 7, ""),
    ):
        page = visit()
        if name == "phone":
            page.set_viewport_size({"width": 390, "height": 844})
        page.goto(page.url + address)
        page.wait_for_selector("#roll svg")
        page.check(f"#example >> text={example}")
        page.wait_for_function(f"document.querySelector('#status').innerText.startsWith('{example}')")
        page.fill("#seed textarea, #seed input", str(seed))
        page.click("#start")
        if name == "light":
            page.wait_for_function("/bar [4-7] of 8/.test(document.querySelector('#status').innerText)")
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.screenshot(path=folder / "space-writing.png")
        watch(page)
        page.mouse.move(5, 5)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"space-{name}.png", full_page=True)
    sizes = {path.name: path.stat().st_size for path in folder.glob("space-*.png")}
    assert len(sizes) == 4 and all(20_000 < size < 200_000 for size in sizes.values()), sizes


# ---- without a browser


@pytest.fixture
def module(monkeypatch):
    """`module(name)`: one of the Space's modules, as the app imports it."""
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module


def test_old_files_go_and_the_oldest_of_too_many(module, tmp_path):
    sweep = module("files").sweep
    for index, age in enumerate((10, 20, 30, 4000)):
        folder = tmp_path / f"visitor{index}"
        folder.mkdir()
        (folder / "continuation.wav").write_bytes(bytes(1_000_000))
        for path in (folder / "continuation.wav", folder):
            os.utime(path, (1e9 - age, 1e9 - age))
    sweep(tmp_path, 1e9, keep_seconds=3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["visitor0", "visitor1", "visitor2"]
    sweep(tmp_path, 1e9, keep_seconds=3600, keep_bytes=2_500_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["visitor0", "visitor1"]


def test_the_roll_draws_every_note_and_escapes_its_texts(module):
    roll = module("roll")
    notes = note_array([(0, 1, 60, 100, 0, 0), (1, 1, 64, 20, 40, 1), (1.5, 0.1, 38, 90, -1, 2)])
    html = roll.draw(roll.Roll(notes, 1.0, 4.0, [0.0, 2.0], ["1", "<2>"], "<b>&"))
    assert 'data-notes="3"' in html and 'data-seconds="4.0000"' in html
    assert len(re.findall(r"M[\d.]+ [\d.]+h", html)) == 3
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html and "&lt;2&gt;" in html
    assert all(name in html for name in ("Acoustic Grand Piano", "Violin", "Drums", 'class="drums"'))
    # Every note lies inside the picture, also at the edges of the keyboard.
    edges = note_array([(0, 9, 0, 127, 0, 0), (0, 9, 127, 127, 0, 0)])
    for _, y, height in re.findall(
        r"M([\d.]+) ([\d.]+)h[\d.]+v([\d.]+)", roll.draw(roll.Roll(edges, 1, 4, [], [], ""))
    ):
        assert 0 <= float(y) and float(y) + float(height) <= 1000
    assert 'data-notes="0"' in roll.draw(roll.Roll(note_array(), 0.0, 4.0, [], [], ""))


def test_colours_can_be_told_from_the_paper():
    """WCAG 2.2, 1.4.11: at least 3 : 1 for what must be seen, against the sheet and the prompt's shade."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    css = (SPACE / "style.css").read_text(encoding="utf-8")
    for block in re.findall(r"^(?::root|\.dark) \{(.*?)^\}", css, re.S | re.M):
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
        assert len(colours) == 17
        for name in ("edge", "drums", *(f"i{index}" for index in range(9))):
            for ground in ("sheet", "heard"):
                low, high = sorted(luminance(colours[key]) for key in (name, ground))
                assert (high + 0.05) / (low + 0.05) >= 3, (name, ground)


def test_bad_prompts_are_named(module):
    music = module("music")
    with pytest.raises(ValueError, match=r"^x\.mid: larger than 1 MB\.$"):
        music.read_prompt(bytes(music.MAX_BYTES + 1), "x.mid")
    crowd = note_array([(0.01 * i, 0.01, i % 128, 64, 0, 0) for i in range(music.MAX_NOTES + 1)])
    from sage_studio.music.midi import score_from_notes

    with pytest.raises(ValueError, match=r"^x\.mid: it has 20,001 notes"):
        music.read_prompt(score_from_notes(crowd).dumps_midi(), "x.mid")


@pytest.mark.parametrize("meter", [(13, 8), (7, 32)])
def test_the_roll_shows_the_bars_that_the_model_hears(module, meter):
    """A meter without a token is another one to the model, while it writes as when it has written."""
    from symusic import Note, Score, TimeSignature, Track

    from sage_studio.checkpoints import load

    music, prompt, track = module("music"), Score(480), Track(program=0)
    prompt.time_signatures.append(TimeSignature(0, *meter))
    track.notes.extend([Note(480 * beat, 240, 60 + beat * 5 % 24, 80) for beat in range(64)])
    prompt.tracks.append(track)
    prompt = music.read_prompt(prompt.dumps_midi(), "odd.mid")
    first, *_, last = music.Writing(*load(), prompt, music.Settings(4, 1, [], 0.9, 0.95, 1))
    heard = len(first.roll.notes) - first.new_notes
    assert first.piece is None and last.piece is not None
    assert first.roll.prompt_end_s == pytest.approx(last.roll.prompt_end_s)
    assert first.roll.notes["onset_s"][:heard].max() < first.roll.prompt_end_s
    assert first.roll.notes["onset_s"][heard:].min() >= first.roll.prompt_end_s - 1e-6
    assert heard == len(last.roll.notes) - last.new_notes


def test_a_piece_has_a_limit_of_time(module, monkeypatch):
    from sage_studio.checkpoints import load

    music = module("music")
    monkeypatch.setattr(music, "WALL_SECONDS", 1.0)
    score = read_score(EXAMPLES / "saints.mid")
    *_, last = music.Writing(*load(), score, music.Settings(4, 32, [], 0.9, 0.95, 1))
    assert last.piece.bars < 32 and any("cancelled" in remark for remark in last.piece.remarks)
    *_, last = music.Writing(*load("perceivers"), score, music.Settings(4, 60, [], 0.9, 0.95, 1))
    assert last.piece.music_s < 60 and any("cancelled after" in remark for remark in last.piece.remarks)
    with pytest.raises(ValueError, match="lengths"):
        music.Settings(4, float("nan"), [], 0.9, 0.95, 1)
