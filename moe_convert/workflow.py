"""What the commands do, from a recipe to a finished folder: plan, convert, verify."""

from __future__ import annotations

from pathlib import Path

from moe_convert.card import refresh_card, write_card
from moe_convert.checkpoint import Source, open_source, sha256_of
from moe_convert.checkpoint.replace import recover
from moe_convert.convert import Progress, convert, silent
from moe_convert.errors import MoeConvertError, VerificationError
from moe_convert.manifest import Manifest, VerifyReport, load_manifest
from moe_convert.plan import Plan, check_fits
from moe_convert.recipe import Recipe
from moe_convert.verify import verify


def upcycle(plan: Plan, *, force: bool = False, progress: Progress = silent) -> Manifest:
    """Convert, verify, write the card; return the manifest, whose state tells how the check went.

    Raises:
        DoesNotFitError: disk or memory is too small and `force` is off.
        OutputExistsError: the output folder exists and may not be replaced.
    """
    check_fits(plan, force)
    manifest = convert(plan, progress)
    if plan.recipe.verify.enabled and (plan.estimate.verify_fits or force):
        manifest.verify = verify(
            plan.output,
            plan.source.fetch(),
            parity=plan.exact,
            tolerance=plan.recipe.verify.tolerance,
            prompts=tuple(plan.recipe.verify.prompts),
            wide=manifest.target.float32,
            progress=progress,
        )
        _record(manifest, plan.output, manifest.verify)
    if plan.recipe.output.card:
        write_card(plan.output, manifest, name=plan.recipe.push.repo_id)
    return manifest


def verify_folder(
    folder: Path, model: str | None, token: str | None = None, progress: Progress = silent
) -> tuple[VerifyReport, Manifest | None]:
    """Verify a folder against `model`, or against the source that its manifest names.

    Raises:
        SourceError: the folder or a given source cannot be read.
    """
    recover(folder)
    manifest = load_manifest(folder) if (folder / "moe_convert.json").is_file() else None
    recipe = Recipe.model_validate(manifest.recipe) if manifest else None
    source = _open_dense(recipe, model, token)
    expected = manifest is None or manifest.exact
    report = verify(
        folder,
        source,
        parity=expected,
        tolerance=recipe.verify.tolerance if recipe else 1e-4,
        prompts=tuple(recipe.verify.prompts) if recipe else (),
        wide=manifest.target.float32 if manifest else (),
        progress=progress,
    )
    report.parity_expected = expected
    if manifest is not None and source is None:
        _compare_hashes(manifest, folder, report)
    if manifest is not None and (report.parity or not report.passed):
        _record(manifest, folder, report)
    return report, manifest


def _compare_hashes(manifest: Manifest, folder: Path, report: VerifyReport) -> None:
    """Hold the files against the manifest, where there is no dense model to hold them against."""
    for file in manifest.target.files:
        if not (folder / file.path).is_file() or sha256_of(folder / file.path) != file.sha256:
            report.failures.append(f"{file.path} is not the file that the conversion wrote")
    if manifest.state == "failed":
        report.failures.append("an earlier check failed, and only one with --source can lift that")
    report.passed = not report.failures


def _open_dense(recipe: Recipe | None, model: str | None, token: str | None) -> Source | None:
    if model is not None:
        return open_source(model, token=token).fetch()
    if recipe is None:
        return None
    try:
        return open_source(recipe.source.model, recipe.source.revision, token).fetch()
    except MoeConvertError:
        return None


def _record(manifest: Manifest, folder: Path, report: VerifyReport) -> None:
    report.calibrated = manifest.calibration is not None
    manifest.verify = report
    compared = bool(report.parity) or manifest.state == "verified"
    manifest.state = ("verified" if compared else "converted") if report.passed else "failed"
    manifest.save(folder)
    refresh_card(folder, manifest)


def require_passed(report: VerifyReport | None, folder: Path) -> None:
    """Turn a failed report into an error.

    Raises:
        VerificationError: a check failed; the folder is kept and marked.
    """
    if report is not None and not report.passed:
        raise VerificationError(
            f"Verification of {folder} failed: {'; '.join(report.failures[:3])}.",
            "The folder is kept and marked as failed in moe_convert.json.",
        )
