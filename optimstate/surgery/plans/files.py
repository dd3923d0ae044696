"""Plan files that the verbs write."""

from __future__ import annotations

from optimstate.io.destination import check_destination
from optimstate.io.location import Place
from optimstate.io.places import located, new_file
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rows import with_index_files

__all__ = ["check_plan_destination", "save_plan"]


def check_plan_destination(path: Place, *sources: Place, force: bool = False) -> None:
    """Refuse to write a plan where something else is; `-` is standard output, which is always free.

    Raises:
        DestinationError: It exists and `force` is false, is a source, or its folder does not exist.
    """
    if str(path) != "-":
        check_destination(located(path), [located(source) for source in sources if str(source) != "-"], force=force)


def save_plan(text: str, path: Place) -> None:
    """Write a plan file, all of it or nothing, after the files of its long indices beside it.

    Raises:
        DestinationError: It cannot be written.
    """
    target = located(path)
    if "gather" in text:
        plan, files = with_index_files(Plan.from_toml(text), target.stem)
        for name, index in files.items():
            with new_file(target.parent / name) as file:
                file.write(index.encode())
        text = plan.to_toml() if files else text
    with new_file(target) as file:
        file.write(text.encode())
