"""Uploads exports, and runs while they train, to the Hugging Face Hub. The token appears in no message."""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from refreshkv.files import RECORD_FILE
from refreshkv.settings import SettingsError
from refreshkv.train.config import HubConfig
from refreshkv.train.public_files import public_checkpoint, public_run
from refreshkv.train.run_folder import METRICS_FILE, RUN_FILE

RUN_FILES = (RUN_FILE, METRICS_FILE)
"""Files of a run's folder that are uploaded with each evaluation."""

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
"""Weights of an earlier upload, which a new one deletes: transformers would load an old single file and not the new
shards."""

LONGEST_REASON = 300


class HubError(SettingsError):
    """An upload cannot start, or has failed. One line, without the token."""


def validate_push(repo: str, setting: str = "--push-to-hub") -> None:
    """Raises `HubError` if a push must fail: the name is none that the Hub takes, or there is no token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{setting}: {error}") from None
    if not get_token():
        raise HubError(f"{setting}: there is no token; log in with `hf auth login` or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads the files of `folder` to the model repository `repo`, created if it is missing; returns its address.

    Weights of an earlier upload are replaced, other files in the repository stay. The token is that of `hf auth login`
    or HF_TOKEN. Raises `HubError` if that fails, and if `private` is set but the repository is public.
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
            ignore_patterns=[RECORD_FILE],
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


class BackgroundPush:
    """Uploads evaluations and checkpoints of a run from a thread of its own, one at a time, in order.

    An upload that fails is reported to `say` in one line, once for each reason, and training goes on. A checkpoint that
    was removed before its turn is skipped.
    """

    def __init__(self, hub: HubConfig, output: Path, say: Callable[[str], None]):
        self.hub, self.output, self.say = hub, output, say
        self._tasks: queue.Queue = queue.Queue()
        self._told: set[str] = set()
        self._address: str | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def metrics(self, step: int) -> None:
        """Uploads the run's settings, metrics and evaluations as they are now, without this machine's paths."""
        files = {name: file.read_bytes() for name in RUN_FILES if (file := self.output / name).is_file()}
        if RUN_FILE in files:
            files[RUN_FILE] = public_run(self.output / RUN_FILE)
        self._tasks.put((f"metrics after step {step}", lambda api, repo: _push_files(api, repo, files, step)))

    def checkpoint(self, folder: Path) -> None:
        """Uploads a finished checkpoint to checkpoints/NAME, unless `hub.checkpoints` is false."""
        if self.hub.checkpoints:
            self._tasks.put((f"checkpoint {folder.name}", lambda api, repo: _push_checkpoint(api, repo, folder)))

    def close(self, timeout: float = 600.0) -> None:
        """Waits until everything is uploaded, at most `timeout` seconds."""
        self._tasks.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.say(f"warning: hub.repo={self.hub.repo}: not all was uploaded within {timeout:g} s")

    def _work(self) -> None:
        assert self.hub.repo is not None
        while (task := self._tasks.get()) is not None:
            what, upload = task
            try:
                api = HfApi()
                if self._address is None:
                    self._address = api.create_repo(self.hub.repo, private=self.hub.private, exist_ok=True).repo_id
                upload(api, self._address)
            except Exception as error:  # the client's, the network's, the operating system's
                reason = _reason(error)
                if reason not in self._told:
                    self._told.add(reason)
                    self.say(f"warning: hub.repo={self.hub.repo}: {what} was not uploaded: {reason}; training goes on")


def _push_files(api: HfApi, repo: str, files: dict[str, bytes], step: int) -> None:
    _commit(api, repo, files, f"Metrics after step {step}")


def _push_checkpoint(api: HfApi, repo: str, folder: Path) -> None:
    if folder.is_dir():
        files = {f"checkpoints/{folder.name}/{name}": file for name, file in public_checkpoint(folder).items()}
        _commit(api, repo, files, f"Checkpoint {folder.name}")


def _commit(api: HfApi, repo: str, files: Mapping[str, Path | bytes], message: str) -> None:
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    api.create_commit(repo, operations=operations, commit_message=message)
