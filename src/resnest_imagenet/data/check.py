"""resnest-data check: finds faults and oddities of a data set in the folder layout."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from resnest_imagenet.data.decoding import OTHER_FORMATS, BadImage
from resnest_imagenet.data.examine import Examined, Finding, count_cores, examine_files
from resnest_imagenet.data.folder import tell_by_name
from resnest_imagenet.data.reading import open_regular
from resnest_imagenet.data.source import list_folders, require_root, require_separate, suggest_split
from resnest_imagenet.errors import DataError, list_names, printable
from resnest_imagenet.files import write_atomically

# A fault would stop a training, hide images from it, falsify its result or exhaust its memory; a note would not. Both
# stand in the order of the printed table.
FAULTS = (
    "missing folder",  # of a part
    "no class folders",
    "misplaced image",  # beside the class folders
    "missing class",  # the other part has it
    "no images",  # in a class
    "unseen image",  # with another suffix than the listing takes
    "broken link",
    "not a file",  # a pipe, a socket or a device
    "unreadable",
    # From decoding.Fault:
    "empty",
    "not an image",
    "wrong format",
    "wrong mode",
    "too large",
    "damaged",
    "crash",  # of the process that decoded it
    "in train and val",
    # For scenes, see check_scenes.py:
    "missing mask",
    "missing image",
    "wrong mask",  # its values are not class indices
    "unknown label",
    "other size",  # the mask's differs from the image's
    # For images with objects, see check_coco.py:
    "no annotations",  # no JSON file
    "bad annotations",  # the whole file or one entry
)
NOTES = (
    "in two classes",
    "twice in a class",
    "known oddity",  # of ImageNet
    "odd format",
    "odd mode",
    "tiny",
    "nested folder",  # in a class: its images are taken
    "hidden",  # it is not read
    "other file",  # not an image
    # For scenes:
    "twice in a part",
    "absent class",  # in no mask
    "palette mask",  # its indices are the classes
    # For images with objects:
    "skipped objects",
    "unlisted image",  # not in the annotations
    "id 0",  # of an annotation
)

# Where the signature of an image file stands, the signature, its format; for formats that are taken and others.
SIGNATURES = (
    *(signature for signature in OTHER_FORMATS if len(signature[1]) >= 4),  # a text may begin with a shorter one
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (6, b"\0\0\0\0", "BMP"),  # after BM, see `_name_format`
)
# After this many crashes, the machine is at fault rather than the files.
MAX_CRASHES = 10


@dataclass
class Part:
    """The content of the folder of train or val.

    Attributes:
        name: its folder, below the data set's root.
        classes: the number of images in each class folder; for scenes, the number of images that show a class.
        images: their paths, below the root.
        findings: faults and oddities of the folders.
    """

    name: str
    classes: dict[str, int] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, path: str, detail: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, path, detail))


@dataclass(frozen=True)
class Report:
    """All findings, and the data set that was checked."""

    root: str
    parts: tuple[Part, ...]
    findings: tuple[Finding, ...]

    @property
    def num_faults(self) -> int:
        """Count the findings that are faults."""
        return sum(finding.kind in FAULTS for finding in self.findings)


def check_images(root: str, train_dir: str | None, val_dir: str | None, workers: int | None = None) -> Report:
    """Check every folder and decode every image of <root>/<train_dir> and <root>/<val_dir>; each file is read once.

    Args:
        root: the data set's folder.
        train_dir: the part to train on, or None.
        val_dir: the part to evaluate on, or None.
        workers: number of processes; None means one for each core that this process may use.

    Raises:
        DataError: there is no such folder, or the processes keep dying.
    """
    require_root(root)
    if train_dir is not None and val_dir is not None:
        require_separate(Path(root, train_dir), Path(root, val_dir))
    names = {"data.train_dir": train_dir, "data.val_dir": val_dir}
    parts = tuple(list_part(root, name, option) for option, name in names.items() if name is not None)
    findings = [finding for part in parts for finding in part.findings]
    if len(parts) == 2:
        findings += compare_classes(*parts)
    findings += examine_parts(root, parts, workers, lambda path: _locate(parts, path))
    return Report(root, parts, tuple(findings))


def examine_parts(
    root: str, parts: Sequence[Part], workers: int | None, locate: Callable[[str], tuple[str, str]]
) -> list[Finding]:
    """Decode the images of the parts; return what is wrong or odd with each, and those with the same content.

    Args:
        root: their paths are below it.
        parts: of the data set.
        workers: number of processes; None means one for each core that this process may use.
        locate: returns the part and the class of an image.

    Raises:
        DataError: the processes keep dying.
    """
    findings: list[Finding] = []
    paths = [path for part in parts for path in part.images]
    originals: dict[bytes, str] = {}
    for result in watch(examine_files(root, paths, workers or count_cores()), root, "images", len(paths)):
        findings += result.findings
        if result.sha256:
            original = originals.setdefault(result.sha256, result.path)
            if original != result.path:
                kind = _relate(locate(original), locate(result.path))
                findings.append(Finding(kind, result.path, f"the same as {original}"))
    return findings


def watch(results: Iterable[Examined], root: str, unit: str, total: int) -> Iterator[Examined]:
    """Yield results with a progress bar, unless the processes that compute them keep dying.

    Args:
        results: of `examine_files`.
        root: the data set, for the error.
        unit: the name of what is examined, for the bar.
        total: number of results.

    Raises:
        DataError: after MAX_CRASHES crashes.
    """
    crashes = []
    for result in tqdm(results, unit, total, unit="", disable=None, dynamic_ncols=True):
        yield result
        crashes += [finding.path for finding in result.findings if finding.kind == "crash"]
        if len(crashes) == MAX_CRASHES:
            raise DataError(f"{root}: {MAX_CRASHES} processes died decoding (is memory short?): {', '.join(crashes)}")


def list_part(root: str, name: str, option: str) -> Part:
    """List the images of <root>/<name> as read_image_folder does, with all that it would refuse or skip.

    Args:
        root: the data set's folder.
        name: the part's folder in it.
        option: the option that names it, for the report.
    """
    part = Part(name)
    if not os.path.isdir(os.path.join(root, name)):
        part.add("missing folder", name, guess_folder(root, name, option))
        return part
    loose = []
    for path, kind in _scan(part, root, name) or []:
        if kind == "folder":
            _list_class(part, root, path)
        elif kind in ("image", "unseen image"):
            loose.append(path)
        else:
            part.add(kind, path)
    if part.classes:
        for path in loose:
            part.add("misplaced image", path, f"images belong in {name}/<class>/")
    else:
        part.add("no class folders", name, f"{len(loose):,} images in it; they belong in {name}/<class>/")
    return part


def _list_class(part: Part, root: str, folder: str) -> None:
    before = len(part.images)
    is_readable = _list_images(part, root, folder, (os.path.realpath(os.path.join(root, part.name)),))
    part.classes[os.path.basename(folder)] = len(part.images) - before
    if is_readable and len(part.images) == before:
        part.add("no images", folder)


def _list_images(part: Part, root: str, folder: str, above: tuple[str, ...]) -> bool:
    """List the content of a class folder and of the folders in it; return whether it can be read."""
    real = os.path.realpath(os.path.join(root, folder))
    entries = [] if real in above else _scan(part, root, folder)
    for path, kind in entries or []:
        if kind == "image":
            part.images.append(path)
        elif kind == "unseen image":
            part.add(kind, path, _name_format(root, path))
        elif kind == "folder":
            part.add("nested folder", path, "its images are taken")
            _list_images(part, root, path, (*above, real))
        elif kind == "other file" and (form := _name_format(root, path)):
            part.add("unseen image", path, form)
        else:
            part.add(kind, path)
    return entries is not None


def _name_format(root: str, path: str) -> str:
    """Return "a <format> image" by the signature at a file's start; "" if no known format has it."""
    try:
        with open(open_regular(os.path.join(root, path)), "rb") as file:
            head = file.read(32)
    except (BadImage, OSError):
        return ""
    forms = (form for place, mark, form in SIGNATURES if head.startswith(mark, place))
    form = next((form for form in forms if form != "BMP" or head.startswith(b"BM")), None)
    return f"a {form} image" if form else ""


def _scan(part: Part, root: str, folder: str) -> list[tuple[str, str]] | None:
    """Return (path, kind) of the entries of a folder, sorted; None if it cannot be read."""
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            return sorted((f"{folder}/{entry.name}", _tell(entry)) for entry in entries)
    except OSError as error:
        part.add("unreadable", folder, str(error.strerror))
        return None


def _tell(entry: "os.DirEntry[str]") -> str:
    """Return "folder", "image", or a kind of FAULTS or NOTES; links are followed, files are not opened."""
    kind = tell_by_name(entry.name)
    if kind == "hidden":
        return kind
    if entry.is_symlink() and not os.path.exists(entry):  # is_dir() would raise for a link to itself
        return "broken link"
    if kind == "image":  # a run reports a folder or a pipe with such a name when it opens it
        return kind if entry.is_file() else "not a file"
    if entry.is_dir():
        return "folder"
    if not entry.is_file():
        return "not a file"
    return "unseen image" if kind == "other format" else kind


def guess_folder(root: str, name: str, option: str) -> str:
    """Suggest the folder that was probably meant, such as validation or Val for val."""
    folders = list_folders(root)
    alike = [folder for folder in folders if folder.lower().startswith(os.path.basename(name)[:3].lower())]
    if alike:
        return f"set {option}={alike[0]}"
    return f"set {option}; there: {list_names(folders, 5) or 'no folders'}{suggest_split(root, folders)}"


def compare_classes(train: Part, val: Part) -> list[Finding]:
    """Return the classes that only one part has. Missing classes and images as such are reported elsewhere."""
    if not train.classes or not val.classes:
        return []
    return [
        Finding("missing class", f"{part.name}/{name}", f"{other.name} has it")
        for part, other in ((train, val), (val, train))
        for name, num_images in other.classes.items()
        if num_images and name not in part.classes
    ]


def _relate(place: tuple[str, str], other: tuple[str, str]) -> str:
    """Return the kind of finding for two files with the same content, by part and class of each."""
    if place[0] != other[0]:
        return "in train and val"
    return "twice in a class" if place == other else "in two classes"


def _locate(parts: Sequence[Part], path: str) -> tuple[str, str]:
    """Return the part and the class of an image <part>/<class>/.../<image>."""
    part = next(part.name for part in parts if path.startswith(part.name + "/"))
    return part, path.removeprefix(part + "/").partition("/")[0]


def format_report(report: Report) -> str:
    """Return a table for people: for each kind its number, the first finding and two more paths; then the totals."""
    by_kind = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding)
    lines = []
    for kind in (*FAULTS, *NOTES):
        if by_kind[kind]:
            first = by_kind[kind][0]
            shown = [first.path + f" ({first.detail})" * bool(first.detail)]
            shown += [finding.path for finding in by_kind[kind][1:3]] + ["..."] * (len(by_kind[kind]) > 3)
            lines.append(f"{_severity(kind):<7}{kind:<18}{len(by_kind[kind]):>9,}  {printable(', '.join(shown))}")
    for part in report.parts:
        lines.append(f"{printable(part.name)}: {len(part.images):,} images in {len(part.classes):,} classes")
    num_notes = len(report.findings) - report.num_faults
    return "\n".join([*lines, f"{report.num_faults:,} faults, {num_notes:,} notes"])


def write_report(report: Report, out: Path) -> None:
    """Write a JSON file for programs: all findings, their numbers, and the parts that were checked."""
    findings = [{"severity": _severity(finding.kind), **asdict(finding)} for finding in report.findings]
    content = {
        "root": report.root,
        "parts": [
            {"folder": part.name, "classes": len(part.classes), "images": len(part.images)} for part in report.parts
        ],
        "faults": report.num_faults,
        "notes": len(findings) - report.num_faults,
        "kinds": dict(sorted(Counter(finding.kind for finding in report.findings).items())),
        "findings": findings,
    }
    with write_atomically(out) as file:
        file.write(json.dumps(content, indent=1).encode())


def _severity(kind: str) -> str:
    return "fault" if kind in FAULTS else "note"
