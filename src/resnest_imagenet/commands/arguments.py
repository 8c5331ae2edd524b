"""The words of a command line, looked at before Hydra: what cannot be meant as it stands is a line with what to type."""

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from resnest_imagenet.commands.synonyms import ADVICE, SYNONYMS, normalise
from resnest_imagenet.errors import ConfigError, suggest
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


class Vocabulary:
    """What a command understands."""

    def __init__(
        self, options: Sequence[str], places: Mapping[str, bool], choices: Mapping[str, Collection[str]]
    ) -> None:
        """Take the names.

        Args:
            options: all of the command, dotted.
            places: those that are files or folders, with whether each takes a list.
            choices: what there is to choose of each group of conf/.
        """
        self.options = options
        self.places = places
        self.choices = choices
        self._sections = {option.partition(".")[0] for option in options if "." in option}

    def is_known(self, name: str) -> bool:
        """Return whether a name is an option's, a group's or of Hydra itself."""
        return name in self.options or name in self.choices or name.partition(".")[0] == "hydra"

    def find_option(self, word: str) -> str | None:
        """Return the option that a word stands for, or a whole option=value; None where that cannot be told.

        Args:
            word: as it was typed, e.g. lr, train.lr0 or batch-size. A dotted one of no section is misspelt rather.
        """
        section, dot, _ = word.partition(".")
        if dot and section not in self._sections:
            return None
        name = normalise(word)
        if word.replace("-", "_") in self.options:
            return word.replace("-", "_")
        same = [option for option in self.options if option.rpartition(".")[2] == name and not self._is_section(option)]
        meant = [*SYNONYMS.get(name, ()), *sorted(same, key=lambda option: not option.startswith("train."))]
        if name in self.options and not self._is_section(name):
            meant.insert(0, name)
        return next((option for option in meant if self._has(option.partition("=")[0])), None)

    def _has(self, option: str) -> bool:
        return option.lstrip("+") in self.options or (option.startswith("+") and option[1:] in self.choices)

    def _is_section(self, option: str) -> bool:
        return any(other.startswith(f"{option}.") for other in self.options)


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
        _refuse_spaces(word, rest)
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
    option = vocabulary.find_option(name)
    if option is None:
        near = suggest(flag, FLAGS) or ": options are written name=value, see --help"
        return f"unknown option {flag}{near}"
    return f"{typed}: write {_write(option, value)}"


def _write(option: str, value: str) -> str:
    """Return what to type for an option, or a whole option=value, quoted for the shell where it must be."""
    if "=" in option:
        return option
    return shlex.quote(f"{option}={value}") if value else f"{option}=..."


def _refuse_spaces(word: str, rest: Sequence[str]) -> None:
    """Refuse spaces around = and in a list, which the shell takes for ends of words."""
    following = rest[0] if rest else ""
    name = re.fullmatch(r"\+{0,2}[A-Za-z_][\w.@/]*=?", word)
    ends_open = word.endswith("=") and following and "=" not in following and not following.startswith(("-", "~"))
    if name and (following.startswith("=") or ends_open):
        value = (following.removeprefix("=") or (rest[1] if len(rest) > 1 else "")) or "..."
        raise ConfigError(f"no spaces around =: write {_write(word.removesuffix('='), value)}")
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
    if name in vocabulary.choices and value not in vocabulary.choices[name] and _is_path(value):
        meant = "data.root" if name == "data" else _guess_option(value, vocabulary)
        if meant in vocabulary.options and (name == "data" or _are_weights(value)):
            raise ConfigError(f"{name} is chosen by name, not by path: write {_write(meant, value)}")
    if vocabulary.is_known(name) or not re.fullmatch(r"[\w.-]+", name):
        return
    if advice := ADVICE.get(normalise(name)):
        raise ConfigError(f"unknown option {name}: {advice}")
    if meant := vocabulary.find_option(name):
        raise ConfigError(f"unknown option {name}: write {_write(meant, value)}")


def _explain_bare(words: Sequence[str], vocabulary: Vocabulary) -> str:
    """Return a line about words without an option, and the options that are meant."""
    advice: dict[str, list[str]] = {}
    for word in words:
        if word in vocabulary.options:
            return f"{word} has no value: write {word}=..."
        meant = _guess_option(word, vocabulary)
        if meant is None:
            return f"cannot read {word!r}: options are written name=value, see --help"
        advice.setdefault(meant, []).append(word)
    return f"{' '.join(words)}: write {' '.join(_write_all(advice, vocabulary))}"


def _write_all(advice: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Iterator[str]:
    for option, values in advice.items():
        is_list = vocabulary.places.get(option, False) and len(values) > 1
        yield _write(option, f"[{','.join(values)}]" if is_list else values[0])


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
