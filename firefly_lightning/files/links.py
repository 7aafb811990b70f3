"""Names that lead to a file or folder elsewhere, in one step."""

import os
from pathlib import Path

from firefly_lightning.files.atomic import partial_path, remove, remove_whole


def link_whole(target: Path, name: Path) -> None:
    """Has a name lead to a file or folder, in the place of the link or file that the name was before.

    A folder under the name is removed first, since no link can take its place.
    """
    if name.absolute() == target.absolute():
        return
    if name.is_dir() and not name.is_symlink():
        remove_whole(name)
    hidden = partial_path(name)
    remove(hidden)
    hidden.symlink_to(os.path.relpath(target, name.parent))
    hidden.replace(name)
