"""Where a result came from: what a source says about itself, and the hash of what was read of it.

A commit of the Hub or the hash of a GGUF file names a checkpoint for good. Any other local one is
named by the SHA-256 of the files that were read, so that a later run can tell whether it has the
same checkpoint before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_convert.checkpoint import Source, TensorRef, card_data, sha256_of
from moe_convert.compose import ExpertSource
from moe_convert.experts import Compose
from moe_convert.manifest import Manifest, SourceInfo
from moe_convert.recipe import Recipe

ADAPTER_CONFIG = "adapter_config.json"


def files_of(source: Source) -> dict[str, Path]:
    """Return the files that are read of a local checkpoint, by their name in its folder."""
    if source.sha is not None or source.folder is None:
        return {}
    others = [source.folder / file for file in (Path("config.json"), *source.side_files())]
    return _named(source.folder, source.tensors.values(), others)


def expert_files(expert: ExpertSource) -> dict[str, Path]:
    """Return the files that are read of a local checkpoint or adapter whose FFNs become experts."""
    if expert.adapter is None:
        return files_of(expert.source)
    folder = expert.adapter.folder
    return _named(folder, expert.refs, [folder / ADAPTER_CONFIG])


def _named(folder: Path, refs: Iterable[TensorRef], others: list[Path]) -> dict[str, Path]:
    paths = {ref.path for ref in refs} | set(others)
    return {str(path.relative_to(folder)): path for path in sorted(paths)}


class Hashing:
    """Hashes each file once, behind the conversion."""

    def __init__(self, pool: Executor) -> None:
        """Begin with nothing."""
        self._pool, self._hashes = pool, dict[Path, Future[str]]()

    def start(self, files: Mapping[str, Path]) -> None:
        """Hash these files, unless that was asked for before."""
        for path in files.values():
            if path not in self._hashes:
                self._hashes[path] = self._pool.submit(sha256_of, path)

    def of(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Return the hashes of files that were started."""
        return {name: self._hashes[path].result() for name, path in files.items()}


def content_sha256(files: Mapping[str, str]) -> str | None:
    """Return one SHA-256 over names and hashes; None where there are no files."""
    if not files:
        return None
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def with_origin(info: SourceInfo, folder: Path | None, files: dict[str, str]) -> SourceInfo:
    """Return the description of a source with its content, licence and languages."""
    card = card_data(folder)
    return info.model_copy(
        update={
            "license": info.license or _text(card.get("license")),
            "license_name": _text(card.get("license_name")),
            "license_link": _text(card.get("license_link")),
            "languages": _texts(card.get("language")),
            "files": files,
            "content_sha256": content_sha256(files),
        }
    )


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _texts(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one]


def differing(recorded: SourceInfo, files: Mapping[str, str]) -> list[str]:
    """Return the files of a source that are not those that were recorded."""
    names = sorted(recorded.files.keys() | files.keys())
    return [name for name in names if recorded.files.get(name) != files.get(name)]


@dataclass(frozen=True)
class License:
    """A licence as the Hub's metadata names it."""

    id: str
    name: str | None = None
    link: str | None = None


def license_of(manifest: Manifest) -> License | None:
    """Return the licence that was asked for, or the only one that sources declare."""
    wanted = manifest.recipe["output"]["license"]
    if wanted != "inherit":
        return License(wanted)
    declared = _declared(manifest)
    return declared[0] if len(declared) == 1 else None


def license_conflict(manifest: Manifest) -> str:
    """Return why a licence cannot be inherited, as a sentence; empty if it can or was given."""
    declared = _declared(manifest)
    if manifest.recipe["output"]["license"] != "inherit" or license_of(manifest):
        return ""
    if not declared:
        return f"{manifest.source.id} declares no licence; set one with --license."
    names = " and ".join(one.name or one.id for one in declared)
    return f"The sources have different licences, {names}; set one with --license."


def _declared(manifest: Manifest) -> list[License]:
    """Return every licence that a source declares, once."""
    found = [
        License(one.license, one.license_name, one.license_link)
        for one in (manifest.source, *manifest.expert_sources)
        if one.license
    ]
    return list(dict.fromkeys(found))


def unnamed(manifest: Manifest, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what was recorded by its name only, and the option that must say where it is."""
    if named_only(manifest.source, recipe.source.model):
        yield "--source", manifest.source.id
    experts = recipe.experts
    models = [one.model for one in experts.sources] if isinstance(experts, Compose) else []
    found = zip(manifest.expert_sources, models, strict=True)
    names = {model: info.id for info, model in found if named_only(info, model)}
    yield from (("--source-expert", name) for name in names.values())
    if local_data(recipe):
        yield "--data", recipe.data.given.name


def calibrations(manifest: Manifest) -> Iterator[Recipe]:
    """Yield the recipe of every calibration in its order, with all that it resolved."""
    for report in manifest.trainings:
        yield Recipe.model_validate({**manifest.recipe, **report.settings})


def local_data(recipe: Recipe) -> bool:
    """Whether a recipe's text is a file or a glob, of which a manifest keeps the last part only."""
    data = recipe.data.given
    return isinstance(data.train, str) and data.hub is None and not data.is_self


def named_only(info: SourceInfo, model: str) -> bool:
    """Whether a recorded source can be found neither on the Hub nor in a package."""
    return info.revision is None and not model.startswith("package://")
