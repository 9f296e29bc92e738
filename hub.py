"""
The Hugging Face hub: the name of a repository in, a folder on this machine out; and a folder's way up.

    openvla/openvla-7b             the repository as it is now
    openvla/openvla-7b@v0.1        one revision of it: a branch, a tag or a commit
    hf:openvla/openvla-7b          the same, where a folder `openvla` is here and the name would count as a path

    find_model(name)  -> weights, configuration, tokenizer: what a policy reads, and nothing else
    find_data(name)   -> the files of RLDS and LeRobot folders

A folder of that name always wins. What was downloaded lies in the standard cache (HF_HOME, HF_HUB_CACHE), as links to
files that are named by their content, and is there without a network, too (HF_HUB_OFFLINE=1).

The names of files are chosen here, from the repository's list: no code and no pickle but OFT's components
(docs/security.md), and of weights in two formats only one. Needs `pip install huggingface_hub`.
"""

import errno
import glob
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from files import read_json_object

HUB_PREFIX = "hf:"
HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
OUR_FOLDERS = ("runs",)  # where runs are written: a name such as runs/toy_lora is never asked for on the hub

OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # errors that no network is to blame for

MODEL = "model"
DATASET = "dataset"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE_WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Of a model: files that are read besides the weights. None of them is in a folder, but the adapter of official OFT.
SMALL_MODEL_FILE = re.compile(
    r"\w[\w.-]*\.json|tokenizer\.model|\w[\w.-]*--[\w.-]*checkpoint\.pt|lora_adapter/[\w-]+\.json", re.ASCII
)
WEIGHT_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
OFFICIAL_ADAPTER_WEIGHTS = f"lora_adapter/{ADAPTER_WEIGHTS}"

# Of data: what formats/rlds.py and formats/lerobot.py read, in any folder.
DATA_FILE = re.compile(
    r"([\w=+-][\w.=+-]*/)*[\w=+-][\w.=+-]*\.(json|jsonl|parquet|mp4|png|jpe?g|tfrecord(-[\w-]+)?)", re.ASCII
)


@dataclass(frozen=True)
class Repository:
    """One revision of a repository on the hub."""

    name: str  # owner/name
    revision: str | None  # None: the newest
    kind: str  # MODEL or DATASET

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


# -----------------------------------------------------------------------------
# Names


def is_hub_name(name: str | Path) -> bool:
    """
    True for owner/name[@revision], with or without hf: before it. Without, only if no folder `owner` is here: then
    the name is a path, perhaps a mistyped one.
    """
    text = str(name)
    match = HUB_NAME.fullmatch(text.removeprefix(HUB_PREFIX))
    if not match:
        return False
    if text.startswith(HUB_PREFIX):
        return True
    owner = text.split("/")[0]
    return not Path(text).exists() and not Path(owner).exists() and owner not in OUR_FOLDERS


def parse_hub_name(name: str | Path, kind: str = MODEL) -> Repository:
    """Return the repository that a name means. Raises ValueError if it is none."""
    match = HUB_NAME.fullmatch(str(name).removeprefix(HUB_PREFIX))
    if not match:
        raise ValueError(f"{name}: expected owner/name or owner/name@revision, as on huggingface.co")
    return Repository(match["repo"], match["revision"], kind)


# -----------------------------------------------------------------------------
# Find a folder: here, in the cache, or on the hub


def find_model(name: str | Path) -> Path:
    """
    Return the folder of a checkpoint. A name of the hub is downloaded, but for what the cache has. Any other name comes
    back as a path, whether it is there or not. Raises FileNotFoundError, ValueError or OSError with the remedy.
    """
    if Path(name).is_dir() or not is_hub_name(name):
        return Path(name)
    repository = parse_hub_name(name, MODEL)
    return download(
        repository, lambda files: choose_model_files(files, str(repository), lambda: fetch_index(repository))
    )


def find_cached_model(name: str | Path) -> Path | None:
    """Return the folder of a checkpoint if it is here or in the cache, or None. Asks nobody."""
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        return None
    try:
        return cached_folder(parse_hub_name(name, MODEL))
    except FileNotFoundError:  # no package, so no cache
        return None


def find_data(name: str | Path, datasets: Iterable[str] = ()) -> Path:
    """
    Return a folder of data. hf:owner/name is downloaded, but for what the cache has; any other name comes back as a
    path. datasets: the folders of the repository that are needed, none: all. Raises as `find_model`.
    """
    if not str(name).startswith(HUB_PREFIX):
        return Path(name)
    repository = parse_hub_name(name, DATASET)
    return download(repository, lambda files: choose_data_files(files, list(datasets), repository))


def name_of_data(name: str | Path) -> str:
    """Return the name of a data repository without its owner, or "" for a folder on this machine."""
    if not str(name).startswith(HUB_PREFIX):
        return ""
    return parse_hub_name(name, DATASET).name.split("/")[1]


def download(repository: Repository, choose: Callable[[dict[str, int]], list[str]]) -> Path:
    """
    Return the folder of a repository in the cache, with the files that `choose` takes from its list (name -> bytes).
    Raises FileNotFoundError, ValueError or OSError that says what to do.
    """
    hub = import_hub(repository)
    with explained(repository):
        try:
            info = list_repository(repository)
        except errors_of_hub():
            folder = cached_folder(repository)
            if folder is None:
                raise
            return folder

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = choose(sizes)
    missing = {file: sizes[file] for file in wanted if not is_cached(repository, info.sha, file)}
    if missing:
        check_room(repository, sum(missing.values()))
        announce(repository, missing)
    with explained(repository):
        folder = hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=[glob.escape(file) for file in wanted],
        )
    return Path(folder)


def list_repository(repository: Repository):
    """Return what the hub says of a repository: its commit, and its files with their sizes."""
    hub = import_hub(repository)
    return hub.HfApi().repo_info(
        repository.name,
        repo_type=repository.kind,
        revision=repository.revision,
        files_metadata=True,
    )


def cached_folder(repository: Repository) -> Path | None:
    """Return where the cache has a repository, whole or not, or None."""
    hub = import_hub(repository)
    try:
        folder = hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=[],
            local_files_only=True,
        )
    except FileNotFoundError:
        return None
    return Path(folder) if Path(folder).is_dir() else None


def is_cached(repository: Repository, commit: str, file: str) -> bool:
    """True if the cache has a file of a commit."""
    hub = import_hub(repository)
    path = hub.try_to_load_from_cache(repository.name, file, revision=commit, repo_type=repository.kind)
    return isinstance(path, str)


def check_room(repository: Repository, nbytes: int):
    """Raise OSError if the cache's disk has no room for so many bytes."""
    cache = cache_of_hub()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(nearest).free
    if nbytes > free:
        raise OSError(
            f"{repository}: {nbytes / 1e9:.1f} GB to download, the disk of {cache} has {free / 1e9:.1f} GB free; make "
            f"room, or set HF_HOME to a folder of another disk"
        )


def announce(repository: Repository, missing: dict[str, int]):
    """Print what is downloaded, and where it goes. Progress bars are shown in a terminal only."""
    hub = import_hub(repository)
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    gigabytes = sum(missing.values()) / 1e9
    print(f"{repository}: downloading {len(missing)} files, {gigabytes:.2f} GB, to {cache_of_hub()}", file=sys.stderr)


# -----------------------------------------------------------------------------
# Which files?


def choose_model_files(files: Iterable[str], place: str, find_index: Callable[[], Path]) -> list[str]:
    """
    Return the files of a model that are read: configuration, tokenizer, OFT's components, and the weights that the
    index names or, without one, model.safetensors. Of an adapter, that instead.

    files: all that a repository or a folder has. place: its name, for messages. find_index: returns the path of its
    model.safetensors.index.json. Raises ValueError if it is no checkpoint.
    """
    small = [file for file in files if SMALL_MODEL_FILE.fullmatch(file)]
    weights = [file for file in (WHOLE_WEIGHTS, ADAPTER_WEIGHTS) if file in files]
    if ADAPTER_CONFIG in files:
        weights = [file for file in weights if file == ADAPTER_WEIGHTS]
    elif INDEX in files:
        named = named_weights(find_index())
        weights = [file for file in files if file in named]
    elif not weights and OFFICIAL_ADAPTER_WEIGHTS in files:
        weights = [OFFICIAL_ADAPTER_WEIGHTS]

    if CONFIG not in files and ADAPTER_CONFIG not in files and OFFICIAL_ADAPTER_WEIGHTS not in files:
        raise ValueError(
            f"{place}: no checkpoint, it has neither {CONFIG} nor {ADAPTER_CONFIG}; it has {sample(files)}"
        )
    return [*small, *weights]


def fetch_index(repository: Repository) -> Path:
    """Return the index of a repository's weights, in the cache."""
    hub = import_hub(repository)
    with explained(repository):
        return Path(hub.hf_hub_download(repository.name, INDEX, revision=repository.revision))


def named_weights(index: Path) -> set[str]:
    """Return the weight files that an index names; none if it is broken, which open_checkpoint says."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict):
        return set()
    return {name for name in names.values() if isinstance(name, str) and WEIGHT_FILE.fullmatch(name)}


def choose_data_files(files: dict[str, int], datasets: list[str], repository: Repository) -> list[str]:
    """
    Return the files of a data repository that are read: those of the datasets, folders at its top, or of all.
    Raises ValueError if one of them is not there.
    """
    known = [file for file in files if DATA_FILE.fullmatch(file)]
    for dataset in datasets:
        if not any(file.startswith(f"{dataset}/") for file in known):
            folders = sorted({file.split("/")[0] for file in known if "/" in file})
            raise ValueError(
                f"{repository}: no dataset {dataset} in it; its folders are {', '.join(folders) or 'none'}"
            )
    if not known:
        raise ValueError(f"{repository}: no data that is read here; it has {sample(files)}")
    if not datasets:
        return known
    starts = tuple(f"{dataset}/" for dataset in datasets)
    return [file for file in known if file.startswith(starts)]


def sample(files: Iterable[str]) -> str:
    """Return the first names of a list, for a message."""
    names = sorted(files)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "no files"


# -----------------------------------------------------------------------------
# Upload


def upload(files: dict[str, Path | bytes], name: str, message: str, private: bool = False) -> str:
    """
    Put files into a repository of the hub, in one commit, and return its address. The repository is made if there is
    none. Weights that it has besides are removed: two sets would contradict each other.
    files: name in the repository -> path here, or content. Raises FileNotFoundError, ValueError or OSError.
    """
    repository = parse_hub_name(name)
    hub = import_hub(repository)
    api = hub.HfApi()
    with explained(repository):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        operations = [hub.CommitOperationAdd(file, content) for file, content in files.items()]
        for file in api.list_repo_files(repository.name, revision=repository.revision):
            is_old_weight = WEIGHT_FILE.fullmatch(file) or file == INDEX
            if is_old_weight and file not in files:
                operations.append(hub.CommitOperationDelete(file))
        commit = api.create_commit(repository.name, operations, commit_message=message, revision=repository.revision)
    return str(commit.commit_url)


# -----------------------------------------------------------------------------
# The package, and its errors


def import_hub(repository: Repository):
    """Return the package huggingface_hub. Raises FileNotFoundError that says how to install it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{repository}: no such folder here, and to get it from the hub a package is missing: pip install "
            f"huggingface_hub"
        ) from None
    return huggingface_hub


def cache_of_hub() -> Path:
    """Return the folder of the standard cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def errors_of_hub() -> tuple:
    """Return what the package raises if the hub cannot be asked, or answers with an error."""
    from huggingface_hub import errors

    http_errors = errors.HfHubHTTPError.__bases__  # of httpx or requests, by the package's version
    return (OSError, *http_errors)


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn the package's errors into one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if repository.kind == DATASET else ''}{repository.name}"
    try:
        yield
    except errors.GatedRepoError:
        raise OSError(
            f"{repository}: gated; accept its terms at {page}, then `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repository}: the repository has no revision {repository.revision}; {page}/tree/main lists its branches"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository}: no such folder here, and no such {repository.kind} repository at {constants.ENDPOINT} that "
            f"you may read; check the name, or if it is private: `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "`hf auth login` with a token that may write" if status in (401, 403) else "try again later"
        raise OSError(f"{repository}: {constants.ENDPOINT} answered with status {status}; {remedy}") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repository}: {error!s:.200}") from None
    except errors_of_hub() as error:
        if getattr(error, "errno", None) in OUR_DISK:
            raise OSError(
                f"{repository}: {cache_of_hub()}: {error.strerror}; make room, or set HF_HOME to another folder"
            ) from None
        raise FileNotFoundError(
            f"{repository}: not in the cache {cache_of_hub()}, and {constants.ENDPOINT} cannot be reached; connect and "
            f"run the same command again, or give a folder (HF_HUB_OFFLINE must not be set)"
        ) from None
