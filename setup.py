"""What `pyproject.toml` cannot say: with SOURCE_DATE_EPOCH set, an sdist has the same bytes wherever it is built."""

from __future__ import annotations

import gzip
import os
import tarfile
from typing import Any

from setuptools import setup
from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """An sdist without the time, the owner and the umask of its build; setuptools sees to that for wheels only."""

    def make_archive(
        self, base_name: str, format: str, root_dir: str | None = None, base_dir: str | None = None, **owner: Any
    ) -> str:
        """Pack the release tree."""
        date = os.environ.get("SOURCE_DATE_EPOCH")
        if date is None or format != "gztar" or root_dir is not None or base_dir is None:
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)
        path = f"{base_name}.tar.gz"

        def without_build(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(date), 0, 0, "", ""
            return member

        with gzip.GzipFile(path, "wb", mtime=int(date)) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(base_dir, filter=without_build)
        return path


setup(cmdclass={"sdist": ReproducibleSdist})
