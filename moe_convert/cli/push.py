"""The command that publishes a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_convert.cli.base import app, command
from moe_convert.console import Output, push_lines, quiet_hub

if TYPE_CHECKING:
    from moe_convert.hub import Pushed
    from moe_convert.plan import Plan

PANEL = "Dangerous options"


@command(app, "push")
def push(
    output: Output,
    model: Annotated[Path, typer.Argument(help="Folder that `upcycle` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, org/name.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Default: private if it is new, as it is if it exists."
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option(help="Branch, made if it is missing; refs/pr/N goes on with a pull request."),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune/--no-prune",
            help="Delete what an earlier push left and this folder no longer has (default).",
        ),
    ] = True,
    license: Annotated[  # noqa: A002
        str | None, typer.Option(help="Licence of the result, where its sources disagree.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be uploaded, and where to.")
    ] = False,
    token: Annotated[
        str | None, typer.Option(help="Hub token; `hf auth login` or HF_TOKEN are safer.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Publish a folder that failed its check.", rich_help_panel=PANEL
        ),
    ] = False,
) -> None:
    """Upload a finished folder to the Hub; what is there already is not uploaded again."""
    from moe_convert.hub import push as upload
    from moe_convert.hub import push_section

    target = push_section(
        repo_id=repo_id,
        private=private,
        branch=branch,
        create_pr=create_pr,
        commit_message=commit_message,
        prune=prune,
    )
    quiet_hub(output)
    with output.progress() as progress:
        done = upload(
            model,
            target,
            token=token,
            license=license,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )

    def human(console: Any) -> None:
        for line in push_lines(done, output.verbose > 0 or dry_run):
            console.print(line, markup=False)

    output.result(
        {"hub": done.section, "artifacts": {"model": str(model)}},
        quiet=done.pr_url or done.url,
        human=human,
        status="planned" if dry_run else "ok",
    )


def check_push(output: Output, plan: Plan, token: str | None) -> None:
    """Check before a conversion that its result can be published, if that is wanted."""
    if plan.recipe.push.repo_id is not None:
        from moe_convert.hub import check_target

        quiet_hub(output)
        with output.busy("asking the Hub"):
            check_target(plan.recipe.push, token, plan)


def push_result(output: Output, plan: Plan, token: str | None) -> Pushed | None:
    """Publish what a conversion wrote, if that is wanted."""
    if plan.recipe.push.repo_id is None:
        return None
    from moe_convert.hub import push as upload

    with output.progress() as progress:
        return upload(plan.output, plan.recipe.push, token=token, progress=progress)
