"""Uploading a finished folder to the hub: what can be refused is refused before any work, and nothing is lost after it.

The token is the library's own (HF_TOKEN, or what `hf auth login` stored); it is handed to nobody but the library, and
what a server answers is printed without addresses (they can be signed) and without anything that looks like a token.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

from compress.errors import CompressError, Interrupted
from compress.output import WEIGHT_FILES

_OPTION = "--push-to"
_LOGIN = "set HF_TOKEN, or type `hf auth login`, with a token that may write"
#: weights that a reader would take for this model's if an earlier upload left them beside the new ones
_REPLACED = [
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
]


def check_push(repo: str, replace: bool, dry: bool = False) -> str:
    """Find out before the work whether a folder can be uploaded to a repository afterwards.

    Args:
        repo: "name" or "org/name".
        replace: it may hold weights already.
        dry: look at the name alone, ask nobody.

    Returns:
        The id with its namespace (as given when `dry`).

    Raises:
        CompressError: not an id; offline; no token, or one that the hub does not take; weights are there.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        what = f"{repo!r} is not the id of a repository"
        raise CompressError(what, _OPTION, "use NAME or ORG/NAME: letters, digits, '-', '_' and '.'") from None
    if dry:
        return repo
    if is_offline_mode():
        raise CompressError("offline mode is set", _OPTION, "unset HF_HUB_OFFLINE, or upload the folder later")
    api = HfApi()
    with _asking(f"{_OPTION} {repo}", _LOGIN):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise CompressError("the token may read only", f"{_OPTION} {repo}", _LOGIN)
        full = repo if "/" in repo else f"{user['name']}/{repo}"
        try:
            there = api.list_repo_files(full)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            there = []
    held = [name for name in there if name.endswith(WEIGHT_FILES)]
    if held and not replace:
        what = f"it holds weights already ({held[0]})"
        raise CompressError(what, f"{_OPTION} {full}", "choose another repository, or pass --overwrite to replace them")
    return full


def push(folder: Path, repo: str, public: bool = False, replace: bool = False) -> str:
    """Upload a finished folder, making the repository if there is none. Returns its address.

    Args:
        repo: "org/name", from `check_push`.
        public: a new repository is public; one that exists stays as it is.
        replace: remove the repository's earlier weights in the same commits.

    Raises:
        CompressError: the upload failed; the folder stays, and the error says how to try again.
    """
    from huggingface_hub import HfApi

    again = shlex.join(["hf", "upload", repo, str(folder), ".", *([] if public else ["--private"])])
    remedy = f"the finished folder {folder} stays; to try again, type: {again}"
    api = HfApi()
    try:
        with _asking(f"{_OPTION} {repo}", remedy), _no_bars():
            made = api.create_repo(repo, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message="Upload the compressed model",
                delete_patterns=_REPLACED if replace else None,
            )
    except KeyboardInterrupt:
        raise Interrupted("stopped while it was uploaded", f"{_OPTION} {repo}", remedy) from None
    return str(made)


@contextlib.contextmanager
def _asking(where: str, remedy: str) -> Iterator[None]:
    """Calls to the hub; failures as one line.

    The library and the HTTP and Xet clients below it raise errors that share no base (a LocalTokenNotFoundError is an
    OSError, a connection that is refused is none), so all are caught, here only. They are not chained: their texts
    hold addresses.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise CompressError(f"the hub did not take it ({_reason(error)})", where, remedy) from None


def _reason(error: BaseException) -> str:
    """What went wrong, short, without addresses and tokens."""
    answered: BaseException = error
    while getattr(answered, "response", None) is None and answered.__cause__ is not None:
        answered = answered.__cause__
    status = getattr(getattr(answered, "response", None), "status_code", None)
    text = getattr(answered, "server_message", None) or str(error)
    for pattern, instead in ((r"\w+://\S+", "(address)"), (r"\bhf_\w+", "(token)"), (r"(?i)bearer \S+", "(token)")):
        text = re.sub(pattern, instead, text)
    secret = _token()
    text = " ".join((text if not secret else text.replace(secret, "(token)")).split())
    return f"{type(error).__name__ if status is None else f'HTTP {status}'}: {text[:200]}"


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:  # an exchange of tokens that failed; the failure itself is being reported
        return None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The library's own progress bars off: they would be drawn through ours, and into logs."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the environment has set them on
        disable_progress_bars()
        try:
            yield
        finally:
            if not before:
                enable_progress_bars()
