"""The words of a command line, looked at before Hydra: of what it cannot read, a line tells what to type instead."""

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from resnest_imagenet.commands.synonyms import ADVICE, SWITCHES, SYNONYMS, normalise
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.options import Options
from resnest_imagenet.schemas import list_places, option_names, walk_options
from resnest_imagenet.weights.sources import BEST, SUFFIXES, is_described, is_published

# Hydra's own flags, and whether a value follows.
FLAGS = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m"), False),
    **dict.fromkeys(("--shell-completion", "-sc"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"), True),
    **dict.fromkeys(("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), True),
}
# The option that a bare path is for: the first of these that a command has.
_PLACES = ("images", "data.root", "runs", "results", "archives", "out")
_SHOWN = 4  # of words that are repeated in a line


class Vocabulary:
    """What a command understands."""

    def __init__(self, schema: type[Options], choices: Mapping[str, Collection[str]]) -> None:
        """Take the names.

        Args:
            schema: of the command.
            choices: what there is to choose of each group of conf/.
        """
        self.options = option_names(schema)
        self.places = list_places(schema)
        self.choices = choices
        self._switches = {name for name, field in walk_options(schema) if field.annotation is bool}
        self._sections = {option.partition(".")[0] for option in self.options if "." in option}

    def is_known(self, name: str) -> bool:
        """Return whether a name is an option's, a group's or of Hydra itself."""
        return name in self.options or name in self.choices or name.partition(".")[0] == "hydra"

    def is_option(self, name: str) -> bool:
        """Return whether a name is that of an option with a value, and not of a section of them."""
        return name in self.options and name not in self._sections

    def find_option(self, word: str) -> str | None:
        """Return the option that a word stands for, or a whole option=value; None where that cannot be told.

        Args:
            word: as it was typed, e.g. lr, train.lr0 or batch-size. A dotted one of no section is misspelt rather.
        """
        section, dot, _ = word.partition(".")
        if dot and section not in self._sections:
            return None
        name = normalise(word)
        same = [option for option in self.options if option.rpartition(".")[2] == name]
        same.sort(key=lambda option: not option.startswith("train."))
        own = [word.replace("-", "_"), name]
        options = [option for option in own if self.is_option(option)]
        groups = [option for option in own if option in self.choices]
        meant = [
            *options,
            *SYNONYMS.get(name, ()),
            *groups,
            *filter(self.is_option, same),
        ]
        return next((option for option in meant if self._has(option.partition("=")[0])), None)

    def write(self, option: str, value: str) -> str:
        """Return what to type for an option, or for a whole option=value; quoted for the shell where it must be."""
        if "=" in option:
            return option
        value = value or ("true" if option in self._switches or option in SWITCHES else "")
        if option in SWITCHES and value.lower() in ("true", "false"):
            value = SWITCHES[option][value.lower() == "false"]
        return shlex.quote(f"{option}={value}") if value else f"{option}=..."

    def _has(self, option: str) -> bool:
        return option.lstrip("+") in self.options or (option.startswith("+") and option[1:] in self.choices)


def list_files_of_groups(conf: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """Return what there is to choose of each group: in conf/, and in the folders that --config-dir names."""
    own = [following for word, following in pairwise(words) if word in ("--config-dir", "-cd")]
    own += [word.partition("=")[2] for word in words if word.startswith(("--config-dir=", "-cd="))]
    choices: dict[str, list[str]] = {folder.name: [] for folder in conf.iterdir() if folder.is_dir()}
    for group, names in choices.items():
        for folder in (conf, *map(Path, own)):
            names += [file.stem for file in (folder / group).glob("*.yaml")]
    return choices


def refuse_words(words: Sequence[str], vocabulary: Vocabulary) -> None:
    """Raise a ConfigError for the first words that are not what Hydra reads, with what to type instead.

    What Hydra, or the check of what it has composed, explains as well is left to them.

    Args:
        words: of the command line, without the command.
        vocabulary: of the command.
    """
    bare: list[str] = []
    place = 0
    while place < len(words):
        word, rest = words[place], words[place + 1 :]
        place += 1
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            if name not in FLAGS:
                raise ConfigError(_explain_flag(word, rest, vocabulary))
            place += FLAGS[name] and not equals
            continue
        _refuse_spaces(word, rest, vocabulary)
        if "=" in word:
            _refuse_option(word, vocabulary)
        elif not word.startswith("~"):
            bare.append(word)
    if bare:
        raise ConfigError(_explain_bare(bare, vocabulary))


def _explain_flag(word: str, rest: Sequence[str], vocabulary: Vocabulary) -> str:
    """Return a line about --name, --name=value or --name value."""
    flag, equals, value = word.partition("=")
    name = flag.lstrip("-")
    follows = bool(rest) and not equals and not rest[0].startswith("-") and not re.match(r"[+~]?[\w.]+=", rest[0])
    typed = f"{word} {rest[0]}" if follows else word
    value = rest[0] if follows else value
    if advice := ADVICE.get(normalise(name)):
        return f"{typed}: {advice}"
    option = _guess_option(value, vocabulary) if _are_weights(value) else vocabulary.find_option(name)
    if option is None:
        whole = next((known for known in FLAGS if len(flag) > 3 and known.startswith(flag)), None)
        return f"unknown option {flag}: {f'write {whole}' if whole else 'options are written name=value, see --help'}"
    return f"{typed}: write {vocabulary.write(option, value)}"


def _refuse_spaces(word: str, rest: Sequence[str], vocabulary: Vocabulary) -> None:
    """Refuse spaces around = and in a list, which the shell takes for ends of words."""
    following = rest[0] if rest else ""
    name = re.fullmatch(r"\+{0,2}[A-Za-z_][\w.@/]*=?", word)
    ends_open = word.endswith("=") and following and "=" not in following and not following.startswith(("-", "~"))
    if name and (following.startswith("=") or ends_open):
        value = (following.removeprefix("=") or (rest[1] if len(rest) > 1 else "")) or "..."
        raise ConfigError(f"no spaces around =: write {vocabulary.write(word.removesuffix('='), value)}")
    if "=" not in word or _count_open(word) <= 0:
        return
    joined = word
    for more in rest:
        joined += more if joined.endswith((",", "[")) or more.startswith((",", "]")) else f",{more}"
        if _count_open(joined) <= 0:
            raise ConfigError(f"no spaces in a list: write {joined}")


def _count_open(word: str) -> int:
    """Return how many brackets a word opens and does not close."""
    return word.count("[") - word.count("]")


def _refuse_option(word: str, vocabulary: Vocabulary) -> None:
    """Refuse an option by another name than its own, and a path where a group's choice is due."""
    typed, _, value = word.partition("=")
    name = typed.lstrip("+~").partition("@")[0]
    if name in ("data", "model", "weights") and name in vocabulary.options:
        _refuse_path(name, value, vocabulary)
    if vocabulary.is_known(name) or not re.fullmatch(r"[\w.-]+", name):
        return
    if advice := ADVICE.get(normalise(name)):
        raise ConfigError(f"unknown option {name}: {advice}")
    if meant := vocabulary.find_option(name):
        raise ConfigError(f"unknown option {name}: write {vocabulary.write(meant, value)}")


def _refuse_path(name: str, value: str, vocabulary: Vocabulary) -> None:
    """Refuse a path where one of a few names is due."""
    if value in vocabulary.choices.get(name, ()):
        return
    if name == "data":
        if _is_path(value) and "data.root" in vocabulary.options:
            raise ConfigError(f"data is the kind of data, not its folder: write {vocabulary.write('data.root', value)}")
    elif _are_weights(value) and (meant := _guess_option(value, vocabulary)):
        raise ConfigError(f"{name} does not take a file of weights: write {vocabulary.write(meant, value)}")


def _explain_bare(words: Sequence[str], vocabulary: Vocabulary) -> str:
    """Return a line about words without an option, and the options that are meant."""
    advice: dict[str, list[str]] = {}
    for word in words:
        if vocabulary.is_option(word):
            return f"{word} has no value: write {word}=..."
        meant = _guess_option(word, vocabulary)
        if meant is None:
            return f"cannot read {word!r}: options are written name=value, see --help"
        advice.setdefault(meant, []).append(word)
    typed = " ".join(words[:_SHOWN]) + (" ..." if len(words) > _SHOWN else "")
    return f"{typed}: write {' '.join(_write_all(advice, vocabulary))}"


def _write_all(advice: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Iterator[str]:
    for option, values in advice.items():
        is_list = vocabulary.places.get(option, False) and len(values) > 1
        shown = [*values[:_SHOWN], *(["..."] if len(values) > _SHOWN else [])]
        yield vocabulary.write(option, f"[{','.join(shown)}]" if is_list else values[0])


def _guess_option(word: str, vocabulary: Vocabulary) -> str | None:
    """Return the option of which a bare word is a value: weights, a name of a group, or a path."""
    if _are_weights(word):
        return next((option for option in ("ckpt", "train.init_from") if option in vocabulary.options), None)
    for group in ("model", "recipe", "experiment"):
        if word in vocabulary.choices.get(group, ()):
            option = "+experiment" if group == "experiment" else group
            return option if group in vocabulary.options or "train" in vocabulary.options else None
    if _is_path(word):
        return next((option for option in _PLACES if option in vocabulary.options), None)
    return None


def _are_weights(word: str) -> bool:
    """Return whether a word is a file of weights, a folder with some, or a published name."""
    if re.fullmatch(r"(official|timm):[\w.]+", word) and is_published(word):
        return True
    path = Path(word)
    return word.endswith(SUFFIXES) or (path / BEST).is_file() or is_described(path)


def _is_path(word: str) -> bool:
    return "/" in word or os.path.exists(word)
