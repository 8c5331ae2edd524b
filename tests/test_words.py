"""The language of the project: some words for which the field has a plainer one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "conf", "docs", "tests", "tools", "docker")
SUFFIXES = {".py", ".yaml", ".yml", ".md", ".sh", ".sbatch", ".toml", ".cff", ""}
# Each word is in two parts, so that this file does not have it.
PLAINER = {
    **{f"{verb} " + "on": "resume, or continue" for verb in ("go", "goes", "going", "gone", "went")},
    **{f"{verb} " + "out": "skip, or drop" for verb in ("leave", "leaves", "leaving", "left")},
    **{"men" + end: "fix" for end in ("d", "ds", "ded", "ding")},
    "ami" + "d": "in the middle of",
    "ane" + "w": "again, or from scratch",
}
_BREAK = re.compile(r"\s*\n[\s#*>|-]*")  # of a line, with the marks of a comment or a list


def read_texts():
    """Yield the paths of the project's texts and the texts, in small letters and without line breaks."""
    files = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT), _BREAK.sub(" ", path.read_text(errors="replace")).lower()


def test_the_field_has_plainer_words():
    texts = dict(read_texts())
    assert {Path("README.md"), Path("src/resnest_imagenet/errors.py"), Path("conf/train.yaml")} <= texts.keys()
    uses = [
        f"{path}: {text[max(0, match.start() - 40) : match.end() + 20]!r}: write {plainer}"
        for path, text in texts.items()
        for word, plainer in PLAINER.items()
        if word in text  # much faster than the expression alone
        for match in re.finditer(rf"\b{word}\b", text)
    ]
    assert not uses, "\n".join(uses)
