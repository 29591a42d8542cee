"""Models by their id on the Hugging Face hub: the hub's own library finds them in its cache or downloads them.

The library reads its environment variables: HF_HOME and HF_HUB_CACHE (location of the cache), HF_HUB_OFFLINE=1 (no
downloads), HF_ENDPOINT, HF_TOKEN and HF_HUB_ETAG_TIMEOUT (seconds to wait for the hub). It shows its own progress bars.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from antiphon.core.errors import ModelError, first_line
from antiphon.models.checkpoint.files import missing_files
from antiphon.models.checkpoint.presets import packaged_models

logger = logging.getLogger("antiphon.models")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG_FILES = ["*.json"]
_ALL_FILES = [*_CONFIG_FILES, "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
_NOT_LOADED = ["*/*", "consolidated*", "*.py"]
"""Other formats, copies of the weights in their authors' own layout, and code, which is never executed."""


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `org/name`, unlike other paths."""
    return _HUB_ID.fullmatch(name) is not None


def resolve_model(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint: `name` itself if it is a folder, else the local copy of the hub's model with this id.

    Only the frontend calls it, before any worker starts; workers get the folder. Cached files are not downloaded again.
    If the hub does not answer, a complete copy in the cache is used.
    revision: branch, tag or commit of a model on the hub; without effect on a folder. weights: False to skip them.
    Raises `ModelError` if there is no such folder, model or revision, or if it can be neither downloaded nor found in
    the cache.
    """
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        if revision is not None:
            logger.warning("revision=%r has no effect: the model %s is a folder, not downloaded", revision, name)
        return folder
    if isinstance(name, Path) or not is_hub_id(name):
        raise ModelError(
            f"model {str(name)!r} is neither a folder nor the id of a model on the hub (org/name)",
            remedy=f"pass one of the two, {packaged_models(name)}",
            option="model",
            value=name,
        )
    return _from_hub(name, revision, weights)


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    # Imported here, because it takes a while, and because the library reads its variables at import.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_down = ""
    try:
        # The library repeats this request later, but without a time limit.
        HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(name, revision, error, constants.ENDPOINT) from error
    except OfflineModeIsEnabled:
        hub_down = "HF_HUB_OFFLINE forbids asking the hub"
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise _refused(name, revision, error, constants.ENDPOINT) from error
        hub_down = f"the hub {constants.ENDPOINT} answers {error.response.status_code}"
    except Exception as error:  # from the HTTP library, which depends on the version of the hub's library
        hub_down = f"the hub {constants.ENDPOINT} cannot be reached ({_kind_and_line(error)})"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_ALL_FILES if weights else _CONFIG_FILES,
                ignore_patterns=_NOT_LOADED,
                local_files_only=bool(hub_down),
            )
        )
        if hub_down and not _is_complete(folder, weights):  # offline, the library accepts an incomplete copy
            raise FileNotFoundError(folder)
        return folder
    except Exception as error:
        if not hub_down:
            raise _refused(name, revision, error, constants.ENDPOINT) from error
        what = name if revision is None else f"{name}, revision {revision!r},"
        remedy = "unset HF_HUB_OFFLINE" if "OFFLINE" in hub_down else "try again when it can, or set HF_ENDPOINT"
        raise ModelError(
            f"model {what} is missing or incomplete in the cache {constants.HF_HUB_CACHE}, and {hub_down}",
            remedy=f"{remedy}, or pass the folder of a checkpoint",
            option="model",
            value=name,
        ) from error


def _is_complete(folder: Path, weights: bool) -> bool:
    return (folder / "config.json").exists() and not (weights and missing_files(folder))


def _refused(name: str, revision: str | None, error: Exception, endpoint: str) -> ModelError:
    """Our error for one from the hub's library."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    option, value, limit = "model", name, ""
    if isinstance(error, RevisionNotFoundError):
        fact = f"model {name} has no revision {revision!r} on the hub {endpoint}"
        option, value, remedy = "revision", revision or "", "use a branch, tag or commit that it has"
    elif isinstance(error, GatedRepoError):
        fact, limit = f"model {name} is gated", f"the hub {endpoint} gives it only to those who accepted its terms"
        remedy = "accept them on its page, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        fact = f"model {name!r} is not a folder, and the hub {endpoint} has no such model, or it is private"
        remedy = "check the name, and set HF_TOKEN for a private one"
    elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        fact = f"model {name} is refused by the hub {endpoint} ({error.response.status_code})"
        remedy = "check HF_TOKEN"
    else:
        fact = f"model {name} cannot be downloaded from the hub {endpoint} ({_kind_and_line(error)})"
        remedy = "try again, what is complete is kept"
    return ModelError(fact, limit=limit, remedy=remedy, option=option, value=value)


def _kind_and_line(error: Exception) -> str:
    kind, told = type(error).__name__, first_line(error)
    return kind if told == kind else f"{kind}: {told}"
