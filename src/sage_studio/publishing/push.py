"""A checkpoint, or an export of one, to the Hub.

    sage-music push sage-music user/sage-music-6m --private

What `publishing.export` writes is checked, then sent in one commit; other things in the folder are refused. An
upload that was interrupted is resumed by the same command: what has arrived is not sent again. Of an older export on
the Hub no file stays that the new one has not; files that are no export's stay. The token is the one of `hf auth
login`, of `HF_TOKEN` or of `--token`, and is never printed.
"""

import glob
import inspect
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from .cards import check_card
from .export import check_repo_id, export, export_again, is_export, is_own, write_copy

# httpx's or httpx2's, whichever huggingface_hub is built on.
HTTPError = HfHubHTTPError.__bases__[0]


class PushError(ValueError):
    """What the Hub, the network or the arguments do not allow. `str()` says what to do, and holds no token."""


def push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    exist_ok: bool = False,
    **options,
) -> str:
    """Send a checkpoint to the Hub.

    Args:
        checkpoint: a folder that `export` wrote, or what `export` takes.
        repo_id: `user/name`. The repository is made; one that has files in it already needs `exist_ok`.
        private: make it private.
        revision: branch to write to, made from `main` where it does not exist.
        token: by default the one that `hf auth login` or `HF_TOKEN` gave.
        message: of the commit.
        exist_ok: write a new commit to a repository that has files in it.
        options: of `export`, for a checkpoint that is none yet.

    Returns:
        The commit's id.

    Raises:
        PushError: no token, a wrong one, one that may not write there, a repository that exists, no network.
        CardError, ExportError, ProvenanceError, CheckpointError, MissingExtraError: as `export`, before anything is
            sent.
    """
    check_repo_id(repo_id)
    ready = _is_ready(checkpoint, options)
    api, user = _logged_in(token)
    with tempfile.TemporaryDirectory(prefix="sage-music-push-") as scratch, _errors_of(repo_id, user):
        folder = Path(checkpoint) if ready else export(checkpoint, Path(scratch, "export"), repo_id=repo_id, **options)
        check_card((folder / "README.md").read_text(encoding="utf-8"))
        staged = Path(scratch, "staged")
        write_copy(folder, repo_id, os.symlink, staged)
        _make_repository(api, repo_id, private, exist_ok)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        older = [name for name in api.list_repo_files(repo_id, revision=revision) if is_own(name)]
        info = api.upload_folder(
            folder_path=staged,
            repo_id=repo_id,
            revision=revision,
            commit_message=message or f"{Path(checkpoint).name} by sage-music",
            delete_patterns=[glob.escape(name) for name in older],
        )
    return info.oid


def write_repository(checkpoint: str | os.PathLike, repo_id: str, output: str | os.PathLike, **options) -> Path:
    """Write what `push` would send into a folder: the complete repository. It needs neither token nor network.

    Args:
        checkpoint, repo_id, options: of `push`.
        output: as that of `export`.

    Raises:
        PushError, CardError, ExportError, ProvenanceError, CheckpointError, MissingExtraError: as `push`.
    """
    check_repo_id(repo_id)
    if not _is_ready(checkpoint, options):
        return export(checkpoint, output, repo_id=repo_id, **options)
    check_card(Path(checkpoint, "README.md").read_text(encoding="utf-8"))
    return export_again(checkpoint, output, repo_id)


def _is_ready(checkpoint: str | os.PathLike, options: dict) -> bool:
    """Whether a checkpoint is an export already, which takes no options of one."""
    if not is_export(checkpoint):
        return False
    defaults = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
    given = [name for name, value in options.items() if value != defaults.get(name)]
    if given:
        raise PushError(f"{given[0]} is for an export that is made; {checkpoint} is one already: export it anew.")
    return True


def _logged_in(token: str | None) -> tuple[HfApi, str]:
    """The API with a token that the Hub knows and that may write, and its user's name."""
    token = token or get_token()
    if not token:
        raise PushError("no token: log in by `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch("[!-~]+", token):
        raise PushError("the token has characters that no token has: copy it again.")
    api = HfApi(token=token)
    with _errors_of("login", None):
        found = api.whoami()
    if found.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"the token of {found['name']} may only read: make one that may write.")
    return api, found["name"]


def _make_repository(api: HfApi, repo_id: str, private: bool, exist_ok: bool) -> None:
    """Make the repository, or accept the one that is there."""
    try:
        api.create_repo(repo_id, private=private or None)
        return
    except HfHubHTTPError as error:
        # A token for one repository may make none, and is told so even of the one that is there.
        if error.response.status_code not in (401, 402, 403, 409):
            raise
        try:
            info = api.model_info(repo_id)
        except HfHubHTTPError as unknown:
            raise (unknown if error.response.status_code == 409 else error) from None
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if files and not exist_ok:
        raise PushError(f"{repo_id} exists, and has files in it: --exist-ok writes a new commit to it.")
    if private and not info.private:
        raise PushError(f"{repo_id} exists, and is public: make it private on the Hub first, or choose another name.")


@contextmanager
def _errors_of(what: str, user: str | None) -> Iterator[None]:
    """Whatever the Hub or the network answers as one `PushError`; `user`: whose token it is, once that is known."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set: unset it to push.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if user is None and status in (401, 403):
            raise PushError(f"{constants.ENDPOINT} does not know this token (HF_TOKEN goes before a login).") from error
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise PushError(f"{what}: the token of {user} may not write there.") from error
        if isinstance(error, RevisionNotFoundError):
            raise PushError(f"{what}: no such revision.") from error
        reason = " ".join((error.server_message or f"status {status}").split())
        raise PushError(f"{what}: {constants.ENDPOINT} refused: {reason}") from error
    except HTTPError as error:
        raise _no_connection(what, error) from error
    except RuntimeError as error:  # how an upload of several files says that one failed
        cause = error.__cause__
        if not isinstance(cause, HTTPError):
            raise
        raise _no_connection(what, cause) from error


def _no_connection(what: str, error: Exception) -> PushError:
    again = "" if what == "login" else " Run the same command again: what has arrived is not sent again."
    return PushError(f"{what}: the connection to {constants.ENDPOINT} failed ({type(error).__name__}).{again}")
