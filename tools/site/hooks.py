"""What the site takes from outside docs/: changelog, contributing, a line for every file, the files of conf/."""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/resnest_imagenet"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files from outside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "files.md", content=list_modules()))
    for path in sorted((ROOT / "conf").rglob("*.yaml")):  # pages link to them
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to files of the checkout lead to their copies in the site."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown.replace("](../conf/", "](conf/")


def list_modules() -> str:
    """Return a page with the first sentence of every module, by folder."""
    lines = ["# Every file", "", "What the folders are for: [Architecture](architecture.md).", ""]
    for folder in (PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))):
        lines += [f"## {folder.name}/", "", "| file | what it is for |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            sentence = " ".join(text.partition("\n\n")[0].split()).replace("|", r"\|")
            lines.append(f"| `{path.name}` | {sentence} |")
        lines.append("")
    return "\n".join(lines)
