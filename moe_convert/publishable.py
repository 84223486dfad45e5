"""What may be published of a folder, and why not: state, hashes, licence, secrets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from moe_convert.checkpoint import card_data, sha256_of
from moe_convert.errors import SourceError, UsageError, VerificationError
from moe_convert.manifest import Manifest, SourceInfo, load_manifest

LEFT_OUT = (".*", "*.partial", "*.pt", "*.pth", "*.ckpt", "*.pkl", "__pycache__")
"""Names, of files or of folders, that stay here: hidden ones, unfinished ones, pickles."""

KEPT = (".eval_results", ".gitattributes")
WEIGHTS = "*.safetensors"
TEXT_SUFFIXES = (".json", ".yaml", ".yml", ".md", ".txt", ".html", ".jinja", ".py", "")
LARGEST_TEXT_BYTES = 1 << 26

Progress = Callable[[str, int, int], None]


def publishable(folder: Path) -> list[str]:
    """Return the files that a push takes along, relative to the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.relative_to(folder) for path in paths]
    return [name.as_posix() for name in names if not any(map(_stays, name.parts))]


def _stays(name: str) -> bool:
    return name not in KEPT and any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def read_state(folder: Path, *, force: bool = False) -> Manifest:
    """Return the manifest of a folder that may be published as far as its state goes.

    Raises:
        SourceError: it has no manifest.
        VerificationError: its check failed and `force` is off.
    """
    if not folder.is_dir():
        raise SourceError(f"There is no folder {folder}.", "Give the output of `upcycle`.")
    manifest = load_manifest(folder)
    if manifest.state == "failed" and not force:
        found = manifest.verify.failures[:2] if manifest.verify else []
        raise VerificationError(
            f"{folder} failed its verification: {'; '.join(found) or 'see moe_convert.json'}.",
            "Convert it again, or --force to publish it all the same.",
        )
    return manifest


def check_hashes(
    folder: Path, manifest: Manifest, progress: Progress = lambda what, done, total: None
) -> dict[str, str]:
    """Return the SHA-256 of every file that is published, all as the manifest recorded them.

    Raises:
        VerificationError: a file is missing, is not the recorded one, or holds unknown weights.
    """
    names, recorded = publishable(folder), {f.path: f.sha256 for f in manifest.target.files}
    strays = [name for name in names if fnmatch(name, WEIGHTS) and name not in recorded]
    if strays:
        raise VerificationError(
            f"{strays[0]} in {folder} is not in its manifest: nobody knows what it is.",
            "Move it away.",
        )
    hashes = {}
    for number, name in enumerate(names):
        progress("hash", number, len(names))
        hashes[name] = sha256_of(folder / name)
    progress("hash", len(names), len(names))
    for path in recorded:
        if hashes.get(path) != recorded[path]:
            what = "is not the file that was recorded" if path in hashes else "is missing"
            raise VerificationError(
                f"{path} in {folder} {what} in its manifest.",
                "Convert it again, or undo the change.",
            )
    return hashes


def check_secrets(folder: Path, names: Sequence[str], secrets: Sequence[str]) -> None:
    """Refuse a text file that holds a token.

    Raises:
        UsageError: it names the file, not the token.
    """
    wanted = [secret.strip().encode() for secret in secrets if secret.strip()]
    for name in names:
        path = folder / name
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size <= LARGEST_TEXT_BYTES:
            data = path.read_bytes()
            if any(secret in data for secret in wanted):
                raise UsageError(
                    f"{name} in {folder} holds your Hub token, so it is not published.",
                    "Remove it from the file, and renew the token.",
                )


def check_licence(
    sources: Sequence[SourceInfo], asked: str | None, stated: str | None, *, public: bool
) -> str | None:
    """Return the licence of the result, or None where none is known.

    `asked` is what the user or the recipe wants, `stated` what README.md says.

    Raises:
        UsageError: the sources disagree, somebody contradicts them, or a public push has none.
    """
    declared = {source.id: _named(source) for source in sources if source.license}
    kinds = sorted(set(declared.values()))
    wanted = asked or stated
    if len(kinds) > 1 and wanted is None:
        each = ", ".join(f"{name} is under {kind}" for name, kind in declared.items())
        raise UsageError(
            f"The sources have different licences: {each}.",
            "Read them, and say with --license what the result is under.",
        )
    if len(kinds) == 1:
        source = next(s for s in sources if s.license)
        for who, value in (("--license asks for", asked), ("README.md says", stated)):
            if value is not None and value.lower() != str(source.license).lower():
                raise UsageError(
                    f"{source.id} is under {kinds[0]}, and {who} {value}.",
                    "A conversion keeps its source's licence.",
                )
        return source.license
    if asked and stated and asked.lower() != stated.lower():
        raise UsageError(
            f"README.md says {stated}, and --license asks for {asked}.",
            "Write it again with `moe-convert card`.",
        )
    if public and wanted is None:
        raise UsageError(
            f"No licence of {sources[0].id} is known, and a public model needs one.",
            "Say it with --license, or leave --public out.",
        )
    return wanted


def _named(source: SourceInfo) -> str:
    """Return a licence with its own name, where the Hub knows it only as `other`."""
    return (
        f"{source.license} ({source.license_name})" if source.license_name else source.license or ""
    )


def licence_of(manifest: Manifest, folder: Path, asked: str | None, *, public: bool) -> str | None:
    """Return the licence under which a folder may be published; see `check_licence`."""
    recorded = manifest.recipe.get("output", {}).get("license", "inherit")
    asked = asked or (None if recorded == "inherit" else recorded)
    stated = card_data(folder).get("license")
    sources = [manifest.source, *manifest.expert_sources]
    return check_licence(sources, asked, str(stated) if stated else None, public=public)
