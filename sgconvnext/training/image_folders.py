"""Class folders, on disk or in a tar file: which files are read, as which class, in which order, and which are not."""

import copy
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, TarState

from ..errors import shortened

# The pictures that Pillow reads by itself. What is a sample must not depend on the version of Pillow. Left out are
# drawings and documents (.svg, .eps, .psd), scientific arrays, icons and films.
SUFFIXES = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf"),
        *(".jpg", ".jpx", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff"),
        ".webp",
    }
)
BLOCK = 512  # bytes; a tar file consists of such blocks and ends with two of zeros

Parts = tuple[str, ...]  # of a folder's path below the split


class Listing:
    """The files of a split by folder: images to read, and what else lies there."""

    def __init__(self) -> None:
        self.images: list[tuple[Parts, str, Any]] = []  # folder, path, what to open
        self.others: Counter[tuple[Parts, str]] = Counter()  # by folder and suffix
        self.folders: set[Parts] = {()}

    def add(self, folder: Parts, path: str, found: Any) -> None:
        """Add a file, with what a reader needs to open it."""
        self.folders.add(folder)
        name = posixpath.basename(path)
        stem, suffix = os.path.splitext(name)
        if name.startswith("._"):  # macOS's notes on a picture are no picture
            self.others[folder, "._*"] += 1
        elif suffix.lower() in SUFFIXES:
            self.images.append((folder, path, found))
        else:
            self.others[folder, suffix.lower() or (name if stem.startswith(".") else "no suffix")] += 1

    def unread(self) -> Counter[str]:
        """How many files are not read, by suffix."""
        return _by_suffix(self.others)

    def labels(self, depth: int = 0) -> list[str]:
        """Every image's class: the name of the folder above it that lies ``depth`` folders below the split.

        Raises:
            ValueError: an image lies in no class folder or in a hidden one, or a class folder holds no image.
        """
        for folder, path, _ in self.images:
            if len(folder) <= depth or any(name.startswith(".") for name in folder[depth:]):
                where = "/".join(folder[depth:]) or "the split itself"
                raise ValueError(f"images lie in {where!r} ({path}); put each into its class's folder")
        labels = [folder[depth] for folder, _, _ in self.images]
        above = self.images[0][0][:depth] if self.images else ()  # the same for all images, not for hidden folders
        there = {folder[depth] for folder in self.folders if len(folder) > depth and folder[:depth] == above}
        if empty := sorted(name for name in there - set(labels) if not name.startswith(".")):
            lost = _by_suffix({key: n for key, n in self.others.items() if key[0][depth : depth + 1] == (empty[0],)})
            holds = f", only {counted(lost)}" if lost else ""
            more = f" (likewise {len(empty) - 1} more: {shortened(empty[1:])})" if empty[1:] else ""
            raise ValueError(
                f"class folder {empty[0]!r} holds no image that can be read{holds}{more}; convert its files "
                "to .png or .jpg, or remove it"
            )
        if not labels:
            held = counted(self.unread()) or "no file"
            raise ValueError(f"it holds no image ({held}); name one that holds a folder of images for each class")
        return labels


def _by_suffix(others: dict[tuple[Parts, str], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, suffix), count in others.items():
        found[suffix] += count
    return found


def counted(suffixes: Counter[str]) -> str:
    """``.heic 40, .txt 3``, the most frequent first."""
    return ", ".join(f"{suffix} {count}" for suffix, count in sorted(suffixes.items(), key=lambda kv: (-kv[1], kv[0])))


def natural(name: str) -> list[Any]:
    """timm's key: capitals as small letters, digits as numbers; so ``A`` and ``a`` are equal, and ``1`` and ``01``."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def numbered(labels: list[str], plain: bool = False) -> dict[str, int]:
    """Classes by name, in timm's order, or in torchvision's where ``plain``.

    Names that differ only in capitals or leading zeros are equal in timm's order; here their characters decide. timm
    sorts a set, so that its order of such names is the one of Python's hashes, another in every process.
    """
    names = sorted(set(labels)) if plain else sorted(set(labels), key=lambda name: (natural(name), name))
    return {name: number for number, name in enumerate(names)}


class FolderReader(ReaderImageFolder):  # type: ignore[misc]
    """timm's reader of a folder of class folders, with a list of our own.

    Args:
        root: the split.
        plain: in torchvision's order, by class and name, instead of timm's, by path with numbers in their order.

    Raises:
        ValueError: as of `Listing.labels`; or a link leads nowhere or around in a circle.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: str, plain: bool = False) -> None:
        Reader.__init__(self)
        self.root = root
        found = _walk(root)
        self.unread = found.unread()
        labels = found.labels()
        if len(set(labels)) == 1 and all(len(folder) > 1 for folder, _, _ in found.images):
            below = sorted({folder[1] for folder, _, _ in found.images})
            raise ValueError(
                f"its only class would be {labels[0]!r}, for a class is the folder directly below the split; if "
                f"{shortened(below)} are classes, name {os.path.basename(root)}/{labels[0]} as the split"
            )
        self.class_to_idx = numbered(labels, plain)
        files = [(path, folder, label) for (folder, path, _), label in zip(found.images, labels, strict=True)]
        if plain:
            files.sort(key=lambda file: (file[2], os.path.dirname(file[0]), file[0]))
        else:
            files.sort(key=lambda file: (natural(file[0]), file[0]))
        self.samples = [(path, self.class_to_idx[label]) for path, _, label in files]


def _walk(root: str) -> Listing:
    def failed(error: OSError) -> None:
        raise error

    found = Listing()
    for folder, below, files in os.walk(root, followlinks=True, onerror=failed):
        parts = Path(folder).relative_to(root).parts
        found.folders.add(parts)
        above = [os.path.join(root, *parts[:depth]) for depth in range(len(parts) + 1)]
        for path in (os.path.join(folder, name) for name in below):
            if os.path.islink(path) and any(os.path.samefile(path, each) for each in above):
                raise ValueError(f"the link {path} leads back to a folder that it lies in; remove it")
        for name in files:
            path = os.path.join(folder, name)
            lost = os.path.islink(path) and not os.path.exists(path)
            if lost and os.path.splitext(name)[1].lower() not in SUFFIXES:  # which may have been a folder of images
                raise ValueError(f"the link {path} leads nowhere; mend or remove it")
            found.add(parts, path, path)
    return found


def unread_beside(root: str, read: set[str]) -> Counter[str]:
    """How many files of a folder, by suffix, are not in another reader's list of files ``read``."""
    found = _walk(root)
    return found.unread() + Counter(
        os.path.splitext(path)[1].lower() for _, path, _ in found.images if path not in read
    )


class TarReader(ReaderImageInTar):  # type: ignore[misc]
    """timm's reader of a tar file, with a list of our own.

    Folders that all files share, such as the split's own, are passed over; a tar file in it is a folder of its name.

    Raises:
        ValueError: as of `Listing.labels`; or a file lies in it twice.
        tarfile.TarError: it is no whole tar file.
    """

    def __init__(self, root: str) -> None:
        Reader.__init__(self)
        self.root, self.root_is_tar, self.cache_tarfiles, self.tar_state = root, True, True, TarState()
        found = Listing()
        with tarfile.open(root, "r:") as tar:
            for member in _add_members(found, tar):
                try:
                    with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                        for deeper in _add_members(found, inner, member):  # timm reads none of their images
                            found.others[_folder(deeper, member), ".tar"] += 1
                except tarfile.TarError as error:
                    raise ValueError(f"{member.name} in it is no whole tar file; pack it again") from error
                self.tar_state.children[member.name] = TarState(ti=member)
        self.unread = found.unread()
        labels = found.labels(_shared(found))
        self.class_name_to_idx = numbered(labels)
        # timm's order: by path; of equal ones, files in inner tar files first, then as they lie in the file
        order = sorted(range(len(labels)), key=lambda i: found.images[i][2][2] is None)
        order.sort(key=lambda i: natural(found.images[i][1]))
        self.samples = [found.images[i][2] for i in order]
        self.targets = [self.class_name_to_idx[labels[i]] for i in order]


def _add_members(
    found: Listing, tar: tarfile.TarFile, outer: tarfile.TarInfo | None = None
) -> Iterator[tarfile.TarInfo]:
    """Put a tar file's members into the listing, and yield the tar files among them."""
    for member in _members(tar):
        folder = _folder(member, outer)
        if member.isfile() and member.name.lower().endswith(".tar"):
            yield member
        elif not member.isdir() and (member.isfile() or member.islnk() or os.path.splitext(member.name)[1]):
            found.add(folder, member.name, (member, None, outer))
        else:  # a folder, or a link to one, of which the files may be missing
            found.folders.add((*folder, posixpath.basename(member.name)))


def _folder(member: tarfile.TarInfo, outer: tarfile.TarInfo | None) -> Parts:
    """Where a member lies; a tar file is a folder of its name."""
    above = "" if outer is None else os.path.splitext(outer.name)[0]
    path = f"{above}/{posixpath.dirname(member.name)}"
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All members; links to a file of the same tar file stand for that file, under the link's name."""
    members = tar.getmembers()
    refuse_rest(tar)
    files: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if member.isfile():
            name = posixpath.normpath(member.name)
            if name in files:
                raise ValueError(f"{member.name} lies in it twice, and one of them may be out of date; pack it again")
            files[name] = member
    return [_followed(member, files) if member.islnk() or member.issym() else member for member in members]


def _followed(link: tarfile.TarInfo, files: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    beside = posixpath.dirname(link.name) if link.issym() else ""  # a hard link names its file from the top
    file = files.get(posixpath.normpath(posixpath.join(beside, link.linkname)))
    if file is None:
        return link
    followed = copy.copy(file)
    followed.name = link.name
    return followed


def refuse_rest(tar: tarfile.TarFile) -> None:
    """Refuse a tar file that goes on where tarfile has found its end: tarfile takes a broken header for the end.

    Raises:
        tarfile.ReadError: it has no end mark, or more behind it, as when tar files are joined by cat.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("no end mark")
    while rest := tar.fileobj.read(2**20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more behind its end mark, which no reader would see")


def _shared(found: Listing) -> int:
    """How many folders deep all images lie in the same one, above their classes' folders."""
    images = {folder for folder, _, _ in found.images}
    above = {folder[:depth] for folder in images for depth in range(len(folder))}  # where a README is no class
    visible = {folder for folder in found.folders if not any(name.startswith(".") for name in folder)}
    levels = zip(*(images | (visible - above)), strict=False)
    shared = tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
    return max(len(shared) - (shared in images), 0)
