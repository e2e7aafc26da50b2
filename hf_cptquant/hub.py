"""A finished folder → one commit on the Hub; `push_to_hub` and `save_pretrained` of quantized models.

Everything goes in one commit, and large files are uploaded before it: whatever fails, the repository is as it was.
Files are known by their content, so that the next try does not send again what has arrived. Retries are the client's
for requests and uploads, and ours for the commit, each from the state that the repository is in by then.

The card on the Hub is the user's: only our part of it is replaced. (transformers would write its own over it.)
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, logging

from .calibration import find_tokenizer
from .card import OUR_PART, for_repository, is_generic, text_around, with_our_part
from .checkpoint import CARD_FILE, save_checkpoint
from .errors import CalibrationError, CheckpointError, CPTQuantError, HubError
from .images import find_preprocessor
from .leaderboard import leaderboard_files
from .model_view import head_of_class
from .plan import PLAN_FILE
from .record import QuantizationRecord

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

BESIDE = {  # head of a model → what goes beside it, where that is no tokenizer
    "image-classification": "image processor",
    "image-text-to-text": "processor",
    "speech-seq2seq": "processor",
    "ctc": "processor",
    "audio-classification": "feature extractor",
}
TOKENIZER_FILES = frozenset(("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
IMAGE_PROCESSOR_FILES = frozenset((IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
WAITS = (1.0, 4.0)  # seconds before the commit is tried again
WAYS_OUT = {
    401: "Log in with `hf auth login`, set HF_TOKEN, or pass token=.",
    403: "Use a token that may write there, or create_pr=True.",
    404: "There is no such repository or revision, or the token may not see it.",
}


@dataclass(frozen=True)
class Target:
    """Where a model goes on the Hub, in transformers' words.

    Attributes:
        repo_id: `"name"` or `"namespace/name"`; made if it does not exist.
        private: of a repository that is made; None is the default of the namespace.
        revision: branch, made if it does not exist; None is `main`.
        create_pr: open a pull request instead of committing to the branch.
        token: None is that of `hf auth login` or HF_TOKEN. It is not shown when the target is.
        commit_message, commit_description: of the commit.
        tags: more tags for the card.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = field(default=None, repr=False)
    commit_message: str | None = None
    commit_description: str | None = None
    tags: Sequence[str] = ()


def save_pretrained(
    model: PreTrainedModel,
    record: QuantizationRecord,
    tokenizer: Any,
    save_directory: str | os.PathLike,
    *,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a quantized model: `save_checkpoint`, and to the Hub if that is asked for.

    Args:
        model, record: as for `save_checkpoint`.
        tokenizer: object, name or path that the model was calibrated with, or None for the model's own.
        save_directory: as for `save_checkpoint`.
        push_to_hub: also push the folder; `repo_id` is its name unless it is given.
        kwargs: as for `PreTrainedModel.save_pretrained`, and those of `Target`.

    Raises:
        CheckpointError: the folder holds a model that is not ours.
        HubError: as `push_folder`; the folder is written then.
    """
    to_hub = {part.name: kwargs.pop(part.name) for part in fields(Target) if part.name in kwargs}
    save_checkpoint(model, record, save_directory, **kwargs)
    if push_to_hub and kwargs.get("is_main_process", True):
        target = _target(model, {"repo_id": Path(save_directory).resolve().name, **to_hub})
        push_folder(save_directory, target, (tokenizer, model.name_or_path))


def push_to_hub(
    model: PreTrainedModel,
    record: QuantizationRecord,
    tokenizer: Any,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    **kwargs: Any,
) -> CommitInfo:
    """`push_to_hub` of a quantized model.

    Args:
        model, record, tokenizer: as for `save_pretrained`.
        repo_id: see `Target`.
        max_shard_size: of a file of weights; a push that was cut off goes on with the first file that has not arrived.
        kwargs: those of `Target`.

    Returns:
        The commit; `pr_url` is that of the pull request.

    Raises:
        HubError: as `push_folder`.
    """
    target = _target(model, {"repo_id": repo_id, **kwargs})
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "model"
        save_checkpoint(model, record, folder, max_shard_size=max_shard_size)
        return push_folder(folder, target, (tokenizer, model.name_or_path))


def _target(model: PreTrainedModel, given: Mapping[str, Any]) -> Target:
    """The target that a caller has named, with the tags that the model bears (`add_model_tags`)."""
    tags = given.get("tags") or ()
    return Target(**{**given, "tags": (*(model.model_tags or ()), *([tags] if isinstance(tags, str) else tags))})


def check_can_push(repo_id: str, token: str | bool | None = None) -> None:
    """Find out before long work whether there is a token that may write.

    Raises:
        HubError: the name is not possible, there is no token, or not one to write with.
    """
    with _errors_told(repo_id):
        validate_repo_id(repo_id)
        user = HfApi(token=token).whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"pushing to {repo_id} is not possible: the token of {user['name']} may only read")


def push_folder(folder: str | os.PathLike, target: Target, tokenizers: Sequence[Any] = ()) -> CommitInfo:
    """Push a quantized model from the folder that it was saved to, in one commit.

    Files whose names begin with a dot stay. Weights of an earlier push that the folder does not have are removed. If
    neither the folder nor the repository has a tokenizer (an image processor), that of the source model is added.

    Args:
        folder: of `save_pretrained` or `cptquant quantize`.
        target: where to.
        tokenizers: where the tokenizer or image processor may be (names, paths, objects, None), before the model that
            was quantized.

    Returns:
        The commit; the last one if the repository has all of it already.

    Raises:
        CheckpointError: the folder holds no quantized model.
        PlanError: its plan is damaged.
        HubError: the Hub refused, or was not reached after some tries. The repository is as it was (unless only the
            answer to the commit was lost, which the error says then).
    """
    folder = Path(folder)
    for name in (PLAN_FILE, "config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no quantized model: there is no {name}")
    record = QuantizationRecord.load(folder)
    sources = (*tokenizers, record.base_model)
    api = HfApi(token=target.token)
    with _errors_told(target.repo_id), tempfile.TemporaryDirectory() as scratch:
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        target = replace(target, repo_id=repo_id)
        _make_branch(api, target)
        results = leaderboard_files(record, api)
        for wait in (*WAITS, None):
            there = api.model_info(repo_id, revision=target.revision)
            operations = _operations(api, folder, there, target, sources, results, Path(scratch))
            additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
            where: dict[str, Any] = {"revision": target.revision, "create_pr": target.create_pr}
            api.preupload_lfs_files(repo_id, additions, free_memory=False, **where)
            try:
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=target.commit_message or "Upload model quantized with hf-cptquant",
                    commit_description=target.commit_description,
                    parent_commit=there.sha,
                    **where,
                )
            except HTTPError as error:
                if not _may_pass(error):
                    raise
                # a pull request may be open already although its answer was lost
                if wait is None or target.create_pr:
                    raise HubError(
                        f"pushing to {repo_id} failed at the commit: {_one_line(error)} If only the answer was lost,"
                        " the repository has the commit; if not, push again: what has arrived is not sent again."
                    ) from error
                logger.warning(f"The commit to {repo_id} failed ({_one_line(error)}); trying again in {wait:.0f} s.")
                time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _make_branch(api: HfApi, target: Target) -> None:
    if target.revision is None or target.revision.startswith("refs/pr/"):
        return
    try:
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    except HfHubHTTPError as error:
        if not (target.create_pr and error.response.status_code == 403):  # who may not write may still open one
            raise


def _operations(
    api: HfApi,
    folder: Path,
    there: ModelInfo,
    target: Target,
    sources: Sequence[Any],
    results: Mapping[str, bytes],
    scratch: Path,
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes a repository, in the state that it is in, the folder's."""
    remote = {sibling.rfilename for sibling in there.siblings or ()}
    local = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not (TOKENIZER_FILES | IMAGE_PROCESSOR_FILES) & (local.keys() | remote):
        local |= _tokenizer_files(folder, target, sources, scratch / "tokenizer")
    existing = None
    if CARD_FILE in remote:
        path = api.hf_hub_download(target.repo_id, CARD_FILE, revision=there.sha, local_dir=scratch / str(there.sha))
        existing = _text(Path(path))
    added: dict[str, Path | bytes] = {**local, **results}
    if CARD_FILE in local:
        added[CARD_FILE] = _card(_text(local[CARD_FILE]), existing, target).encode()
    stale = [name for name in sorted(remote - local.keys()) if WEIGHTS.fullmatch(name)]
    return [
        *(CommitOperationAdd(name, content) for name, content in added.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]


def _text(path: Path) -> str:
    """A file's text with its own ends of lines."""
    return path.read_bytes().decode()


def _card(ours: str, existing: str | None, target: Target) -> str:
    """The card for the repository: the text there with our part, or the folder's if nobody has written one."""
    if existing is None or is_generic(existing):
        return for_repository(ours, target.repo_id, target.tags)
    if text_around(ours) not in ("", text_around(existing)):
        logger.warning(
            f"{CARD_FILE} in the folder and in {target.repo_id} have different text around the part of hf-cptquant;"
            f" that in the repository stays. To have the folder's, remove {CARD_FILE} from the repository and push"
            " again."
        )
    if OUR_PART.search(ours) is None:
        return existing
    return for_repository(with_our_part(existing, ours), target.repo_id, target.tags)


def _tokenizer_files(folder: Path, target: Target, sources: Sequence[Any], scratch: Path) -> dict[str, Path]:
    """The files of the tokenizer, or image processor, of the source model; none, and a warning, if it is nowhere."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config).get("vocab_size", 0)
    head = next(map(head_of_class, config.get("architectures") or ()), None)
    what = BESIDE.get(str(head), "tokenizer")
    given = [source for source in sources if source is not None and source != ""]
    for source in given:
        try:
            if what == "tokenizer":
                find_tokenizer(source, vocabulary, target.token).save_pretrained(scratch)
            elif isinstance(source, (str, os.PathLike)):
                find_preprocessor(os.fspath(source), head, target.token).save_pretrained(scratch)
            else:
                source.save_pretrained(scratch)
        except (CalibrationError, ImportError, OSError, ValueError) as error:  # ImportError: what it needs is missing
            logger.info(str(error))
        else:
            return {path.relative_to(scratch).as_posix(): path for path in scratch.rglob("*") if path.is_file()}
    tried = ", ".join(repr(getattr(source, "name_or_path", source)) for source in given)
    logger.warning(
        f"{target.repo_id} has no {what}, and there is none that fits at {tried or 'the source model'}; push it with"
        f' {what.replace(" ", "_")}.push_to_hub("{target.repo_id}").'
    )
    return {}


@contextmanager
def _errors_told(repo_id: str) -> Iterator[None]:
    """What goes wrong inside as one `HubError`: refusals and lost connections (HTTPError), uploads and storage
    (RuntimeError), names and metadata that are not possible (ValueError), no token and no network (OSError)."""
    try:
        yield
    except CPTQuantError:
        raise
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        refused = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = refused.response.status_code if isinstance(refused, HfHubHTTPError) else None
        way_out = WAYS_OUT.get(status or 0, "Push again: what has arrived is not sent again.")
        raise HubError(f"pushing to {repo_id} failed: {_one_line(error)} {way_out}") from error


def _may_pass(error: HTTPError) -> bool:
    """Whether a commit that failed so may work in a while: others were committing, or the server has troubles."""
    if not isinstance(error, HfHubHTTPError):
        return True
    return error.response.status_code in (409, 412, 429) or error.response.status_code >= 500


def _one_line(error: BaseException) -> str:
    causes = [error, *([error.__cause__] if isinstance(error, RuntimeError) and error.__cause__ else [])]
    text = " ".join(" ".join(str(cause).split()) or type(cause).__name__ for cause in causes)
    return text if text.endswith((".", "!", "?")) else text + "."
