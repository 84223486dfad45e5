"""Hub repositories: planned from config.json and safetensors headers, downloaded on demand.

Or never: with `download=False` tensors are read by range while they are converted.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.checkpoint.ranged import RemoteFile, network_errors, read_remote
from moe_convert.checkpoint.safetensors import TensorRef
from moe_convert.checkpoint.source import SIDE_FILES, Source, open_folder, read_config
from moe_convert.errors import HubError, SourceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
SMALL_FILES = ("config.json", "README.md", *SIDE_FILES)
LEGACY_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def open_hub(
    name: str, revision: str = "main", token: str | None = None, download: bool = True
) -> Source:
    """Open `org/name[@rev]`; the revision is resolved to a commit, which the source records.

    Without a network the local Hub cache serves. Without `download` only small files are fetched.

    Raises:
        SourceError: no such repository, revision or file.
        HubError: the Hub refuses or cannot be reached and nothing is cached.
    """
    repo_id, _, at = name.partition("@")
    revision = at or revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    api = HfApi(token=token)
    try:
        return _open_online(api, repo_id, revision, download)
    except HFValidationError as error:
        raise SourceError(
            f"There is no folder {name!r}, and it is no Hub name.",
            "Check the path, or give org/name.",
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated.", f"Accept its terms on its Hub page {repo_id}, then log in."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo_id} is neither a folder here nor a repository that this token can see.",
            "Check the name; for a private one run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} has no revision {revision}.") from error
    except SafetensorsParsingError as error:
        raise SourceError(
            f"{repo_id} has a safetensors file whose header cannot be read.",
            "Tell its authors, or give another revision.",
        ) from error
    except (EntryNotFoundError, NotASafetensorsRepoError) as error:
        if not download:
            raise SourceError(
                f"{repo_id} has no safetensors files, which --no-download needs.",
                "Leave --no-download out.",
            ) from error
        return _open_cached(repo_id, revision, token, local=False)
    except network_errors() as error:
        try:
            return _open_cached(repo_id, revision, token, local=True)
        except HubError:
            raise HubError(
                f"There is no folder {name!r}, and the Hub cannot be reached for {repo_id}.",
                "Check the path, or the network and HF_HUB_OFFLINE.",
            ) from error


def _open_online(api: HfApi, repo_id: str, revision: str, download: bool) -> Source:
    from huggingface_hub import hf_hub_download

    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    token = api.token
    # By its name, not by the commit: that leaves the name in the cache for runs without network.
    config_path = Path(hf_hub_download(repo_id, "config.json", revision=revision, token=token))
    sha = config_path.parent.name
    metadata = api.get_safetensors_metadata(repo_id, revision=sha)
    tensors = {
        name: TensorRef(Path(file), name, str(tensor.dtype), tuple(tensor.shape), 0)
        for file, header in metadata.files_metadata.items()
        for name, tensor in header.tensors.items()
    }
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    remote = {
        file: RemoteFile(repo_id, file, sha, files[file], token) for file in metadata.files_metadata
    }

    @functools.cache
    def fetch() -> Source:
        if download:
            return _open_cached(repo_id, sha, token, local=False)
        return _open_ranged(remote, metadata.weight_map, source)

    card = info.card_data.get("license") if info.card_data else None
    source = Source(
        repo_id,
        read_config(config_path),
        tensors,
        fetch,
        revision=revision,
        sha=sha,
        download_bytes=sum(s for f, s in files.items() if f.endswith(".safetensors")),
        license=str(card) if card else None,
        streamed=not download,
    )
    return source


def _open_ranged(files: dict[str, RemoteFile], places: dict[str, str], source: Source) -> Source:
    """Download tokenizer, licence and the like, and read tensors by range when they are wanted."""
    first = next(iter(files.values()))
    folder = _snapshot(first.repo_id, first.sha, first.token, SMALL_FILES, local=False)
    return replace(source, tensors=read_remote(files, places), folder=folder)


def _snapshot(
    repo_id: str, revision: str, token: str | bool | None, patterns: tuple[str, ...], *, local: bool
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            local_files_only=local,
            allow_patterns=list(patterns),
        )
    )


def _open_cached(repo_id: str, revision: str, token: str | bool | None, local: bool) -> Source:
    """Download (with resume) what a conversion reads, or find it in the local Hub cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = (*SMALL_FILES, *WEIGHT_FILES)
    try:
        folder = _snapshot(repo_id, revision, token, patterns, local=local)
        if not list(folder.glob("*.safetensors")):
            folder = _snapshot(repo_id, revision, token, (*patterns, *LEGACY_FILES), local=local)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{repo_id} is not in the local Hub cache.") from error
    opened = open_folder(folder)
    sha = folder.name if len(folder.name) == 40 else None
    return replace(opened, name=repo_id, revision=revision, sha=sha)
