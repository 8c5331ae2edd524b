"""What every command does around its work: compose and check the configuration, and turn errors into lines."""

import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from resnest_imagenet.commands.arguments import Vocabulary, list_files_of_groups, refuse_words
from resnest_imagenet.commands.help import HELP, drop_flags, format_help, format_typed
from resnest_imagenet.commands.terminal import surviving_output
from resnest_imagenet.commands.versions import asks_for_version, format_versions
from resnest_imagenet.distributed import find_launcher_file, has_joined, launched_as, tell_launcher
from resnest_imagenet.earlier import RENAMED
from resnest_imagenet.errors import (
    ConfigError,
    DataError,
    DistributedError,
    Stopped,
    UserError,
    explain_runtime,
    first_line,
    list_names,
    printable,
    suggest,
)
from resnest_imagenet.options import Options, format_value
from resnest_imagenet.schemas import choose_schema, option_names

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from pydantic import ValidationError

Config = TypeVar("Config", bound=Options)


def find_conf() -> Path:
    """Return conf/: inside the package in a wheel, at the top of the repository in an editable install."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def run_command(name: str, schema: type[Config], job: Callable[[Config], float | None]) -> None:
    """Compose conf/<name>.yaml with the command line, check it, and do the job; exit with the error's code.

    Args:
        name: the primary configuration.
        schema: what it must satisfy.
        job: the command's work; imports torch itself, so that --help need not. What it returns is what a sweeper
            of Hydra's optimises.
    """
    # Idle OpenMP threads sleep instead of spinning: 20 times faster where processes share cores. Before torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Hydra then raises instead of printing a traceback's digest and leaving with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with surviving_output(may_lose=name == "train"):  # a run is worth more than its lines
        _run(name, schema, job)


def _run(name: str, schema: type[Config], job: Callable[[Config], float | None]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    composing = True
    if asks_for_version(sys.argv[1:]):
        print(format_versions())
        return
    asks_for_help = not HELP.isdisjoint(sys.argv[1:])
    if asks_for_help:
        sys.argv[1:] = drop_flags(sys.argv[1:])
    _check_words(name, schema)

    def task(composed: "DictConfig") -> float | None:
        nonlocal composing
        composing = False
        # Hydra adds lines of its own to any Exception that leaves a task, but not to an exit.
        try:
            if asks_for_help:
                print(format_help(composed, schema))
                return None
            from resnest_imagenet.commands.early import refuse_early  # imports NumPy, which --help need not

            config = check_config(composed, schema)
            refuse_early(config)
            return job(config)
        except (UserError, Stopped) as error:
            _leave(error)
        except Exception as error:
            if explained := explain_runtime(error):
                _leave(explained)
            tell_launcher(f"{type(error).__name__}: {first_line(error)}")
            raise
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr)
            sys.exit(130)

    try:
        hydra.main(version_base="1.3", config_path=str(find_conf()), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not composing:
            raise
        _leave(explain_composition(error, schema))


def _check_words(name: str, schema: type[Options]) -> None:
    """Refuse words that Hydra cannot read, and quote paths for it; exit on an error."""
    vocabulary = Vocabulary(schema, list_files_of_groups(find_conf(), sys.argv[1:]))
    try:
        refuse_words(sys.argv[1:], vocabulary)
    except ConfigError as error:
        _leave(error)
    if {"-m", "--multirun"} & set(sys.argv[1:]):  # in a sweep a comma is between values
        _check_sweep(name)
    else:
        sys.argv[1:] = [quote_place(word, vocabulary.places) for word in sys.argv[1:]]


def quote_place(word: str, places: Mapping[str, bool]) -> str:
    """Quote the value of an option that is a file or folder: Hydra has a grammar for what is not quoted.

    To it 2024_05_01 is a number, and a comma, ~ or an umlaut is an error. What may be meant as Hydra's own stays: a
    quoted value, a list, null, anything with a backslash or an interpolation.

    Args:
        word: of the command line.
        places: the options' names, with whether each takes a list.
    """
    option, equals, value = word.partition("=")
    name = option.lstrip("+")
    if not equals or name not in places or value in ("", "null", "???") or (places[name] and "," in value):
        return word
    is_hydras = value[0] in "'\"[{" or "\\" in value or "${" in value
    return word if is_hydras else f"{option}={_quote(value)}"


def _quote(value: str) -> str:
    """Quote a value for Hydra, each item where it is a list."""
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quote(item.strip("'\" ")) for item in value[1:-1].split(",")) + "]"
    return '"' + value.replace('"', '\\"') + '"'


def check_config(composed: "DictConfig", schema: type[Config]) -> Config:
    """Turn a composed configuration into the typed, frozen one.

    Raises:
        ConfigError: names the first option that is unknown, missing, of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from pydantic import ValidationError

    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        unset = OmegaConf.missing_keys(composed)
        raise ConfigError(_say_unset(*(option for option in option_names(schema) if option in unset))) from None
    except OmegaConfBaseException as error:
        unresolved = OmegaConf.to_container(composed)
        assert isinstance(unresolved, dict)
        choose_schema(schema, unresolved)  # values of another task refer to others that are not there
        raise ConfigError(first_line(error)) from None
    assert isinstance(values, dict)
    schema = choose_schema(schema, values)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explain_validation(error, values, schema) from None


def _explain_validation(error: "ValidationError", values: Mapping[Any, Any], schema: type[Options]) -> ConfigError:
    """Turn the first error into a line; an old name before all, of which a missing option may be the consequence."""
    errors = error.errors()
    options = [_find_option(detail["loc"], values) for detail in errors]
    renamed = next((option for option, _ in options if _new_name(option)), None)
    if renamed is not None:
        return _explain_unknown(renamed, schema)
    first, (option, value) = errors[0], options[0]
    if first["type"] == "extra_forbidden":
        return _explain_unknown(option, schema)
    if first["type"] == "missing":
        return ConfigError(_say_unset(option))
    if first["type"] == "value_error":  # a rule between options, in its own words
        return ConfigError(str(first["ctx"]["error"]))
    form = f": write {option}=[A,B]" if first["type"] in ("list_type", "too_short") else ""
    reason = first["msg"].lower().replace(" after validation", "")
    if isinstance(value, list) and value != first["input"]:  # an item of it
        reason = reason.replace("input", format_value(first["input"]), 1)
    typed = format_typed(first["input"] if value is None else value)
    return ConfigError(f"{option}={typed}: {reason}{form}")


def _find_option(location: Sequence[int | str], values: Any) -> tuple[str, Any]:
    """Return the dotted name of an option, without the place in its list, and its whole value; None where it has none.

    Args:
        location: pydantic's, of an error.
        values: what was composed.
    """
    names = list(itertools.takewhile(lambda part: isinstance(part, str), location))
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return ".".join(map(str, names)), values


def _explain_unknown(option: str, schema: type[Options]) -> ConfigError:
    """Return a line with today's name of an option, or the nearest one."""
    if new := _new_name(option):
        return ConfigError(f"{option} is now {new}: write {new}=...")
    return ConfigError(f"unknown option {option}{suggest(option, option_names(schema) + _list_groups())}")


def _new_name(option: str) -> str | None:
    """Return today's name of an option of a recipe that had another one; None for any other."""
    part, _, name = option.partition(".")
    return f"train.{RENAMED[name]}" if part == "train" and name in RENAMED else None


def explain_composition(error: Exception, schema: type[Options]) -> ConfigError:
    """Turn an error of Hydra's composition into one line with the nearest valid name."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        names = list_names(error.options, like=choice)
        return ConfigError(f"unknown {group} {choice!r}{suggest(choice, error.options)} ({names})")
    if isinstance(error, OverrideParseException):
        option, equals, value = str(error.override).partition("=")
        quoted = shlex.quote(option + "=" + _quote(value.strip("'\"")))
        advice = f"quote it for the shell and for Hydra: {quoted}" if equals else "write option=value"
        return ConfigError(f"cannot read {error.override}: {advice}")
    overridden = re.match(r"Could not override '([^']+)'", str(error))
    if overridden:
        return _explain_override(overridden[1], schema)
    if "Config group override must be a string" in str(error):
        return ConfigError("a group cannot be null: write group=NAME (protocol=own: the checkpoint's, not in training)")
    hint = ": write a list as [a,b]" if "Ambiguous value" in str(error) else ""
    return ConfigError(first_line(error) + hint)


def _explain_override(option: str, schema: type[Options]) -> ConfigError:
    """Return a line about an option that cannot be set on the command line."""
    own = [name for name in option_names(schema) if name.startswith("data.")]
    if option == "data" and own:  # resnest-data check and shard have no choices of it
        return ConfigError(f"data is no group of this command: set {', '.join(own)}")
    if option in _list_groups():
        values = [value for name, _, value in (word.partition("=") for word in sys.argv[1:]) if name == option]
        return ConfigError(f"{option} is added, not overridden: write +{option}={(values or ['...'])[0]}")
    if option in option_names(schema):  # of a group of which nothing is chosen, or of another task
        part = option.partition(".")[0]
        if part in ("train", "eval"):
            return ConfigError(f"{option} is of another task than this run: remove it")
        return ConfigError(f"{option} is set by its group: write {part}=NAME")
    return _explain_unknown(option, schema)


def report_skipped(faults: list[str]) -> None:
    """Name the images that were skipped.

    Raises:
        DataError: there are any.
    """
    for fault in faults:
        print(printable(f"{fault}; skipped"), file=sys.stderr)
    if faults:
        raise DataError(f"images skipped: {len(faults)}")


def _leave(error: UserError | Stopped) -> NoReturn:
    """Print the line and exit; if all ranks have the same error, one of them prints it."""
    try:
        rank, local_rank, world_size = launched_as()
    except ConfigError:  # the error is about the launch itself
        rank, local_rank, world_size = 0, 0, 1
    prefix = ""
    if isinstance(error, DistributedError):
        is_reported = error.is_reported
    elif world_size == 1 or not has_joined():
        is_reported = local_rank > 0  # the first rank of each node reports
    elif error.is_shared:
        is_reported = rank > 0
    else:
        is_reported = error.is_reported
        prefix = f"rank {rank}: "
    if is_reported and not isinstance(error, Stopped) and find_launcher_file():
        # torchrun ends all ranks when the first one exits: let that be the rank that reports.
        time.sleep(10)
    if not is_reported:
        line = printable(f"{Path(sys.argv[0]).stem}: {prefix}{error}")
        print(line, file=sys.stderr)
        tell_launcher(line)
    sys.exit(error.exit_code)


def _check_sweep(name: str) -> None:
    """Refuse a sweep under torchrun, and one whose jobs share a folder."""
    try:
        if launched_as().world_size > 1:
            raise ConfigError("--multirun runs one job after another in a single process: start it without torchrun")
    except ConfigError as error:
        _leave(error)
    folders = [word for word in sys.argv[1:] if word.startswith("run_dir=")]
    if name == "train" and not any("$" in word or "," in word for word in folders):
        _leave(ConfigError("--multirun needs a folder for each job: write 'run_dir=runs/sweep/${hydra:job.num}'"))


def _list_groups() -> list[str]:
    return [folder.name for folder in find_conf().iterdir() if folder.is_dir()]


def _say_unset(*options: str) -> str:
    names = " and ".join([", ".join(options[:-1]), options[-1]] if options[1:] else options)
    return f"{names} {'are' if options[1:] else 'is'} not set: give {' '.join(f'{option}=...' for option in options)}"
