"""A push sends an export once, resumes what was interrupted, and says in one line what is in its way."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import tiny_model
from hub_server import ROUTES, LoopbackHub, Rejected, blob_id
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from sage_studio.publishing.export import export, own_files
from sage_studio.publishing.push import write_repository

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "hf_of_someone"


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        server.add_user("someone", TOKEN, orgs=("band",))
        server.add_user("reader", "hf_of_reader", role="read")
        server.add_user("other", "hf_of_other")
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """An export of a tiny model in many files of weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return export(folder / "tiny", folder / "export", license="mit", max_shard_size="200KB", samples=False)


def start(hub: LoopbackHub, tmp_path, *arguments, token: str | None = TOKEN, **variables) -> subprocess.Popen:
    """The command in a process of its own, with nothing but the loopback Hub to talk to."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.Popen(
        [sys.executable, "-m", "sage_studio.cli", "push", *map(str, arguments)],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def push(*arguments, **options) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    assert "hf_of" not in out + err
    return process.returncode, out, err


@pytest.fixture
def sent(hub, monkeypatch):
    """`push` in this process, for what needs no process of its own."""
    from sage_studio.publishing import push as pushing

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    disable_progress_bars()
    yield pushing.push
    enable_progress_bars()


def test_everything_arrives(hub, exported, tmp_path):
    code, out, err = push(hub, tmp_path, exported, "someone/mine", "--private", "--message", "first")
    assert (code, err) == (0, "")
    repository = hub.repository("someone/mine")
    commit = repository.at("main")
    assert repository.private and commit.title == "first" and commit.oid in out
    assert out == f"{hub.url}/someone/mine, commit {commit.oid}\n"
    local = {name: exported / name for name in own_files(exported)}
    assert set(commit.files) == {".gitattributes", *local} and not any(".cache" in name for name in commit.files)
    for name, path in local.items():
        if name != "README.md":
            assert commit.files[name] == path.read_bytes(), name
    assert 'model="someone/mine"' in commit.files["README.md"].decode()
    assert "USER/NAME" in (exported / "README.md").read_text()


def test_a_killed_upload_sends_only_what_is_missing(hub, exported, tmp_path):
    """The process dies in the middle of the weights; the same command goes on from there."""
    weights = sorted(exported.glob("*.safetensors"))
    ids = {path.name: blob_id(path.name, path.read_bytes()) for path in weights}
    assert len(ids) > 1
    stuck, half, killed = ids[weights[-1].name], threading.Event(), threading.Event()

    def hold(sha256, received, size):
        """The last file waits at its half until all others are there, and then for the end."""
        if sha256 != stuck or received <= size // 2:
            return True
        while not all(other in hub.storage for other in ids.values() if other != stuck) and not killed.wait(0.01):
            pass
        half.set()
        killed.wait(60)
        return False

    hub.on_bytes = hold
    process = start(hub, tmp_path, exported, "someone/mine")
    assert half.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    assert list(hub.files("someone/mine")) == [".gitattributes"] and stuck not in hub.storage
    hub.on_bytes = lambda *arguments: True
    hub.received.clear()
    code, _, err = push(hub, tmp_path, exported, "someone/mine")
    assert (code, err) == (0, "")
    assert hub.received == {stuck: weights[-1].stat().st_size}
    assert hub.files("someone/mine")[weights[-1].name] == weights[-1].read_bytes()


def test_a_dropped_connection_is_tried_again(hub, exported, sent):
    """Once is no reason to give up: `huggingface_hub` asks again by itself."""
    dropped = []

    def drop(sha256, received, size):
        if not dropped and received > size // 2:
            dropped.append(sha256)
            return False
        return True

    hub.on_bytes = drop
    sent(exported, "someone/mine")
    (once,) = dropped
    assert hub.received[once] > len(hub.storage[once])
    assert len(hub.files("someone/mine")) > 10


def test_a_connection_that_stays_broken_is_one_error(hub, exported, sent, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.on_bytes = lambda sha256, received, size: False
    with pytest.raises(ValueError, match=r"connection to .* failed .*Run the same command again") as caught:
        sent(exported, "someone/mine")
    assert TOKEN not in str(caught.value)
    hub.on_bytes = lambda *arguments: True
    sent(exported, "someone/mine")
    assert len(hub.files("someone/mine")) > 10


def test_a_second_push_replaces_the_first(hub, exported, sent, tmp_path):
    first = sent(exported, "someone/mine")
    with pytest.raises(ValueError, match=r"someone/mine exists, and has files in it: --exist-ok"):
        sent(exported, "someone/mine")
    hub.received.clear()
    # Nothing has changed: nothing is sent, and no empty commit made.
    assert sent(exported, "someone/mine", exist_ok=True) == first and not hub.received
    single = export(exported, tmp_path / "single", samples=False)
    second = sent(single, "someone/mine", exist_ok=True)
    names = set(hub.files("someone/mine"))
    assert "model.safetensors" in names and "model.safetensors.index.json" not in names
    assert len([name for name in names if name.endswith(".safetensors")]) == 1
    assert hub.files("someone/mine", first).keys() != names and second != first
    third = sent(exported, "someone/mine", revision="sharded", exist_ok=True, message="as it was")
    assert hub.repository("someone/mine").refs == {"main": second, "sharded": third}


def test_only_an_exports_files_are_sent(hub, exported, sent, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "mine")
    for name in ("__pycache__/handler.cpython-311.pyc", ".cache/huggingface/x.metadata", ".gitattributes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of no interest")
    for name in (".env", "notes.txt", "samples/mine.mid", "onnx/model.safetensors", "adapter_model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("nobody's business")
        with pytest.raises(ValueError, match=rf"other things in it \({name.removesuffix('/model.safetensors')}\)"):
            sent(folder, "someone/mine")
        (folder / name).unlink()
        if name.startswith("onnx"):
            (folder / "onnx").rmdir()
    assert not hub.repositories
    sent(folder, "someone/mine")
    files = hub.files("someone/mine")
    assert set(files) == {".gitattributes", *own_files(exported)}
    assert files[".gitattributes"] != b"of no interest"


def test_files_that_are_no_exports_stay(hub, exported, sent, tmp_path):
    first = sent(exported, "someone/mine")
    kept = ("onnx/model.safetensors", "lora/adapter_model.safetensors", "samples/mine.mid", "docs/README.md")
    kept += ("adapter_model.safetensors", "code/sage_studio_music_midi.py", "train_sage_music.py")
    gone = ("samples/continuation.mid", "sage_studio_older.py")
    repository = hub.repository("someone/mine")
    files = repository.at("main").files | {name: b"mine" for name in (*kept, *gone)}
    repository.commit("main", files, "by hand")
    single = export(exported, tmp_path / "single", samples=False)
    sent(single, "someone/mine", exist_ok=True)
    names = set(hub.files("someone/mine"))
    assert names == {".gitattributes", *kept, *own_files(single)}
    assert "model.safetensors.index.json" in hub.files("someone/mine", first)


def test_a_push_under_another_name_names_it(hub, exported, sent, tmp_path):
    """The card of an export that had a name already would load, and trust, the repository of that name."""
    export(exported, tmp_path / "named", repo_id="user/older", samples=False)
    card = tmp_path / "named" / "README.md"
    card.write_text(card.read_text() + "\nIt follows user/older.\n\n```\nhf download user/older\n```\n")
    sent(tmp_path / "named", "someone/mine")
    text = hub.files("someone/mine")["README.md"].decode()
    assert 'model="someone/mine"' in text and "hf download someone/mine" in text and "It follows user/older." in text
    assert text.count("user/older") == 1


def test_a_checkpoint_is_exported_on_the_way(hub, sent):
    sent("perceivers", "band/piano", samples=False)
    files = hub.files("band/piano")
    assert b"cc-by-nc-sa-4.0" in files["README.md"] and "NOTICE.md" in files and "config.json" in files


def test_a_made_card_has_the_name_that_it_gets(hub, sent, tmp_path, tokenizer):
    tiny_model(tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    sent(tmp_path / "tiny", "someone/mine", license="mit", samples=False)
    card = hub.files("someone/mine")["README.md"].decode()
    assert "\n# mine\n" in card and 'model="someone/mine"' in card and "name: tiny" not in card


def test_a_card_that_is_wrong_stops_before_anything_is_sent(hub, exported, sent, tmp_path):
    bad = tmp_path / "bad.md"
    bad.write_text("---\nlicense: free\n---\n")
    with pytest.raises(ValueError, match=r"README.md: license: 'free'"):
        sent("perceivers", "someone/mine", card=bad, samples=False)
    assert not hub.repositories
    with pytest.raises(ValueError, match="license is for an export that is made"):
        sent(exported, "someone/mine", license="mit")


@pytest.mark.parametrize(
    ("token", "repo_id", "reason"),
    [
        ("", "someone/mine", "no token: log in by `hf auth login`"),
        ("hf_of_nobody", "someone/mine", "does not know this token"),
        ("hf_of_secr\u00e9", "someone/mine", "the token has characters that no token has"),
        ("hf_of someone", "someone/mine", "the token has characters that no token has"),
        ("hf_of_reader", "reader/mine", "the token of reader may only read"),
        ("hf_of_other", "someone/mine", "someone/mine: the token of other may not write there"),
        (TOKEN, "mine", "write user/name"),
        (TOKEN, "some one/mine", "write user/name"),
    ],
)
def test_tokens_and_names_that_will_not_do(hub, exported, sent, monkeypatch, token, repo_id, reason):
    from sage_studio.publishing import push as pushing

    monkeypatch.setattr(pushing, "get_token", lambda: token)
    with pytest.raises(ValueError, match=reason) as caught:
        sent(exported, repo_id)
    assert "hf_of" not in str(caught.value)
    assert not hub.repositories


def test_someone_elses_repository_is_said(hub, exported, sent):
    sent(exported, "someone/mine", private=True)
    for name in ("someone/mine", "someone/other"):  # that it exists is nobody's business
        with pytest.raises(ValueError, match=f"{name}: the token of other may not write there"):
            sent(exported, name, token="hf_of_other", exist_ok=True)


def test_a_token_for_one_repository_is_enough(hub, exported, sent, tmp_path):
    """It may make none, which the Hub says before it looks whether this one is there."""
    scoped = "hf_of_someone_for_one"
    hub.add_user("someone", scoped, role="fineGrained", only="someone/mine")
    with pytest.raises(ValueError, match="someone/mine: the token of someone may not write there"):
        sent(exported, "someone/mine", token=scoped)
    assert not hub.repositories
    for name in ("someone/mine", "someone/other"):
        sent(exported, name)
    with pytest.raises(ValueError, match="someone/mine exists, and has files in it: --exist-ok"):
        sent(exported, "someone/mine", token=scoped)
    single = export(exported, tmp_path / "single", samples=False)
    commit = sent(single, "someone/mine", token=scoped, exist_ok=True)
    assert "model.safetensors" in hub.files("someone/mine", commit)
    with pytest.raises(ValueError, match="someone/other: the token of someone may not write there"):
        sent(single, "someone/other", token=scoped, exist_ok=True)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, exported, sent):
    sent(exported, "someone/mine")
    with pytest.raises(ValueError, match="exists, and is public"):
        sent(exported, "someone/mine", private=True, exist_ok=True)


def test_no_network_is_one_line(hub, exported, tmp_path):
    hub.server.server_close()
    code, out, err = push(hub, tmp_path, exported, "someone/mine")
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"sage-music: error: login: the connection to {hub.url} failed")


def test_offline_mode_is_said(hub, exported, sent, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        sent(exported, "someone/mine")


def test_what_the_hub_refuses_is_said(hub, exported, sent, monkeypatch):
    def refuse(*arguments, **groups):
        raise Rejected(400, "Storage limit reached")

    routes = [(method, pattern, refuse if "/commit/" in pattern else answer) for method, pattern, answer in ROUTES]
    monkeypatch.setattr("hub_server.ROUTES", routes)
    with pytest.raises(ValueError, match=r"someone/mine: http://127.0.0.1:\d+ refused: Storage limit reached"):
        sent(exported, "someone/mine")


def test_a_dry_run_writes_what_would_be_sent_and_asks_nobody(hub, exported, sent, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    folder = write_repository(exported, "someone/mine", tmp_path / "sent")
    assert write_repository(exported, "someone/mine", tmp_path / "sent") == folder  # an older one is replaced
    with pytest.raises(ValueError, match="license is for an export that is made"):
        write_repository(exported, "someone/mine", folder, license="mit")
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"other things in it \(thesis\.tex\)"):
        write_repository(exported, "someone/mine", folder)
    (folder / "thesis.tex").unlink()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    sent(exported, "someone/mine")
    files = hub.files("someone/mine")
    assert {name: (folder / name).read_bytes() for name in own_files(folder)} == {
        name: content for name, content in files.items() if name != ".gitattributes"
    }
