"""That the code which is measured comes from where it should, and stays as it was.

Which code is measured is decided by what an interpreter imports: an installed package would stand
in for what the folders of a revision lack, and both sides of a comparison would import the same.
"""

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec


class Origin(msgspec.Struct):
    """folders   that the measured packages have to come from, and all of the repository
    root      of that repository; "" for none
    began     seconds since 1970: no file of theirs may be newer
    """

    folders: list[str]
    root: str
    began: float

    def hold(self, packages: Sequence[str], before: Collection[str]) -> None:
        """Raises RuntimeError for what was imported from elsewhere, or has changed.

        packages   that are measured
        before     the modules that had been imported with the suite, and are in every process
        """
        for name, file in _files():
            own = name not in before
            measured = any(name == each or name.startswith(f"{each}.") for each in packages)
            # What an environment within the repository holds is not the repository's.
            of_root = own and _within(file, [self.root]) and "site-packages" not in Path(file).parts
            if not _within(file, self.folders):
                if measured or of_root:
                    raise RuntimeError(
                        f"{name} was imported from {file}, not from {' or '.join(self.folders)}: "
                        "this side lacks it, or --source does not name the folder that it is "
                        "imported from"
                    )
            elif own and os.stat(file).st_mtime > self.began:
                raise RuntimeError(f"{file} changed meanwhile: compare again")


def _files() -> list[tuple[str, str]]:
    """Of all modules: names and files."""
    files = ((name, getattr(module, "__file__", None)) for name, module in sys.modules.items())
    return [(name, file) for name, file in files if file is not None]


def _within(file: str, folders: Sequence[str]) -> bool:
    return any(folder and file.startswith(f"{folder}{os.sep}") for folder in folders)
