"""What a command refuses before it imports torch, which takes seconds: above all, a file or folder that is not there.

`CHECKS` is the whole list. Each check calls the function that the work calls later, too: so both have the same words.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_data import CheckDataConfig, PreviewDataConfig, ShardDataConfig, SplitDataConfig
from resnest_imagenet.config_reading import (
    AppConfig,
    CompareConfig,
    EvalConfig,
    ExplainConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    Table3Config,
)
from resnest_imagenet.data.csv_list import find_csv
from resnest_imagenet.data.folder import match_paths
from resnest_imagenet.data.scenes import LAYOUTS, find_folders
from resnest_imagenet.data.source import find_part, require_root
from resnest_imagenet.data.validation import find_class_folders
from resnest_imagenet.distributed import launched_as
from resnest_imagenet.files import RESULTS, read_matching, require_exists, require_folder, require_writable
from resnest_imagenet.options import AUTO, Options
from resnest_imagenet.schemas import RECIPES
from resnest_imagenet.training.schedule import count_accumulation
from resnest_imagenet.training.trackers import require_trackers
from resnest_imagenet.weights.hub_push import require_token
from resnest_imagenet.weights.sources import find_weights, is_published, require_known

# This project's own; only another package's source finds its data.
_KINDS = ("folder", "webdataset", "csv", "coco", *LAYOUTS)


def refuse_early(config: Options) -> None:
    """Raise the UserError of the first check that fails.

    Args:
        config: of a command; of those that have no checks, nothing is looked at.
    """
    for schema, checks in CHECKS.items():
        if isinstance(config, schema):
            for check in checks:
                check(config)


def _check_run(config: TrainConfig) -> None:
    require_trackers(config.log.trackers)
    if config.train.batch_size != AUTO:
        count_accumulation(config.train, launched_as().world_size)


def _check_parts(config: TrainConfig) -> None:
    data = config.data
    if data.kind not in _KINDS or config.train.task not in RECIPES:
        return
    if data.kind == "csv":
        find_csv(data.root, data.csv)
        return
    require_root(data.root)
    if data.val_split is not None:
        find_class_folders(data.root, data.train_dir, data.val_dir)
        return
    for option, name in (("data.train_dir", data.train_dir), ("data.val_dir", data.val_dir)):
        if data.kind in LAYOUTS:
            find_folders(data.kind, data.root, name, option)
        elif data.kind != "coco":  # its folders may have other names than these
            find_part(data.root, name, option)


def _check_start(config: TrainConfig) -> None:
    """A run that resumes does not read the weights that it started from."""
    has_begun = any(Path(config.run_dir, "checkpoints").glob("step-*.pt"))
    if config.train.init_from is not None and not has_begun:
        _check_weights([config.train.init_from])


def _check_root(config: EvalConfig) -> None:
    """Only the weights tell which of its folders are read."""
    if config.data.kind == "csv" and (config.data.csv is not None or Path(config.data.root).is_file()):
        find_csv(config.data.root, config.data.csv)
    elif config.data.kind in _KINDS:
        require_root(config.data.root)


def _check_files(config: CheckDataConfig | ShardDataConfig | SplitDataConfig) -> None:
    require_root(config.data.root)


def _check_compared(config: CompareConfig) -> None:
    if config.data.root is not None:
        require_root(config.data.root)
    if config.images is not None:
        match_paths(config.images)


def _check_images(config: PredictConfig | ExplainConfig) -> None:
    for pattern in config.images:
        match_paths(pattern)


def _check_checkpoints(
    config: AppConfig | EvalConfig | PredictConfig | ExplainConfig | ExportConfig | CompareConfig,
) -> None:
    _check_weights(config.ckpt if isinstance(config, CompareConfig) else [config.ckpt])


def _check_weights(sources: Sequence[str]) -> None:
    for source in sources:
        if is_published(source):
            require_known(source)
        else:
            find_weights(source)


def _check_export(config: ExportConfig) -> None:
    if config.int8 is not None:
        require_folder(Path(config.int8), "int8")
    if config.push is not None:
        require_token(config.push)


def _check_runs(config: ReportConfig) -> None:
    read_matching(config.runs, lambda path: require_folder(path, "runs"))


def _check_results(config: Table3Config) -> None:
    read_matching(config.results, lambda path: require_exists(path, "results", RESULTS))


def _outputs(*options: str) -> Callable[[Any], None]:
    """Return a check of the files that a command is to write."""

    def check(config: Options) -> None:
        for option in options:
            path = getattr(config, option)
            if path is not None and launched_as().rank == 0:
                require_writable(Path(path), option)

    return check


CHECKS: dict[type[Options], tuple[Callable[[Any], None], ...]] = {
    TrainConfig: (_check_run, _check_parts, _check_start),
    PreviewDataConfig: (_outputs("out"),),
    CheckDataConfig: (_outputs("out"), _check_files),
    ShardDataConfig: (_check_files,),
    SplitDataConfig: (_check_files,),
    EvalConfig: (_outputs("out", "predictions"), _check_root, _check_checkpoints),
    PredictConfig: (_check_images, _check_checkpoints),
    ExplainConfig: (_check_images, _check_checkpoints),
    CompareConfig: (_outputs("csv", "page"), _check_compared, _check_checkpoints),
    ExportConfig: (_check_export, _check_checkpoints),
    AppConfig: (_check_checkpoints,),
    ReportConfig: (_outputs("out"), _check_runs),
    Table3Config: (_check_results,),
}
