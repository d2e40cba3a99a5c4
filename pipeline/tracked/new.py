"""A new DVC repository."""

from __future__ import annotations

from dvc.repo import Repo


def init_dvc(*, has_git: bool, is_root: bool) -> None:
    """Run `dvc init` in the current folder, which `is_root` says is the root of the git repository, if there is one."""
    Repo.init(no_scm=not has_git, subdir=has_git and not is_root).close()
