"""Uploads an exported folder to the Hugging Face Hub, without ever showing the token."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from refreshkv.settings import SettingsError

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
"""An earlier upload's weights must go: transformers would load a single old file rather than new shards."""

LONGEST_REASON = 300


class HubError(SettingsError):
    """An upload that cannot start or did not end well. One line, without the token."""


def check_push(repo: str) -> None:
    """Raises `HubError` for what would make `push` fail for certain, before any work is done."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--push-to-hub: {error}") from None
    if not get_token():
        raise HubError("--push-to-hub: there is no token; log in with `hf auth login` or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads the files of `folder` to the model repository `repo`, made if it is missing; returns its address.

    Weights of an earlier upload are replaced, other files in the repository stay. The token is the one of
    `hf auth login` or HF_TOKEN. Raises `HubError`, also if `private` is asked for and the repository is public.
    """
    try:
        api = HfApi()
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(address.repo_id).private:
            raise HubError("the repository exists and is public, so nothing was uploaded; choose another one")
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Upload a model with its RefreshKV schedule",
            delete_patterns=WEIGHTS,
        )
    except Exception as error:  # the client's, the network's, the operating system's
        raise HubError(f"--push-to-hub {repo}: {_reason(error)} (the export in {folder} is complete)") from None
    return str(address)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    status = _status(error)
    if status is not None:
        text = f"the Hub answered {status}: {text}"
    elif not isinstance(error, SettingsError):
        text = f"{type(error).__name__}: {text}"
    return _without_token(text)[:LONGEST_REASON]


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that caused the error; the client wraps some errors in others."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "[token]") if token else text
