"""Options: every shipped one is right, every wrong one is explained."""

from typing import Any

import torch
from hydra import compose, initialize_config_dir

from faults.harness import Claims, Place, call
from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.zoo import build_model
from resnest_imagenet.recipe import ClassificationRecipe

VALID = {
    "train": "data.root=/nowhere",
    "evaluate": "data.root=/nowhere ckpt=/nowhere.pt",
    "export": "ckpt=/nowhere.pt",
    "table3": "results=[]",
    "data": "",
}
# Of each command what is wrong, and what the line must say.
MISTAKES = """
train checkpoint.evry_steps=5 -> did you mean 'checkpoint.every_steps'?
train checkpoint.every_steps=0 -> checkpoint.every_steps=0: input should be greater than or equal to 1
train checkpoint.every_steps=soon -> checkpoint.every_steps=soon: input should be a valid integer
train checkpoints.keep=3 -> did you mean 'checkpoint.keep'?
train +checkpoint.keeps=3 -> did you mean 'checkpoint.keep'?
train checkpoint.keep=1 -> checkpoint.keep=1: input should be greater than or equal to 2
train checkpoint.keep=2.5 -> checkpoint.keep=2.5: input should be a valid integer
train checkpoint.on_missmatch=refuse -> did you mean 'checkpoint.on_mismatch'?
train checkpoint.on_mismatch=ignore -> checkpoint.on_mismatch=ignore: input should be 'refuse', 'set_aside' or 'extend'
train timeout_second=60 -> did you mean 'timeout_seconds'?
train timeout_seconds=0 -> timeout_seconds=0: input should be greater than 0
train timeout_seconds=long -> timeout_seconds=long: input should be a valid number
train timeout_seconds=null -> timeout_seconds=null: input should be a valid number
train train.max_skiped_steps=1 -> did you mean 'train.max_skipped_steps'?
train max_skipped_steps=1 -> unknown option max_skipped_steps: write train.max_skipped_steps=1
train train.max_skipped_steps=-1 -> train.max_skipped_steps=-1: input should be greater than or equal to 0
train train.max_skipped_steps=1.5 -> train.max_skipped_steps=1.5: input should be a valid integer
train epochs=3 -> unknown option epochs: write train.epochs=3
train ++train.batchsize=32 -> did you mean 'train.batch_size'?
train train.label_smoothing=1 -> train.label_smoothing=1: input should be less than 1
train train.schedule=cosin -> train.schedule=cosin: input should be 'cosine', 'step', 'milestones' or 'poly'
train train.policy=resnst -> train.policy=resnst: input should be 'resnest', 'resnest_torch', 'autoaugment'
train train.ema_decay=high -> train.ema_decay=high: input should be a valid number
train loader.worker=4 -> did you mean 'loader.workers'?
train log.every_stpes=1 -> did you mean 'log.every_steps'?
train device=gpu -> device=gpu: auto, cpu, cuda, cuda:1 (any number) and mps are valid
train seed=-1 -> seed=-1: input should be greater than or equal to 0
train run_dir=[3] -> run_dir=[3]: input should be a valid string
train data=webdatasets -> did you mean 'webdataset'?
train recipe=bag_of_trick -> did you mean 'bag_of_tricks'?
train +experiment=seresnext50_32x4 -> did you mean 'seresnext50_32x4d'?
train experimnt=resnest50 -> did you mean 'experiment'?
train +experimnt=resnest50 -> did you mean 'experiment'?
evaluate crops=224 -> did you mean 'crop'?
evaluate crop=big -> crop=big: input should be a valid integer
evaluate weights=emma -> weights=emma: input should be 'auto', 'model' or 'ema'
evaluate protocol=papr -> did you mean 'paper'?
evaluate batch_size=0 -> batch_size=0: input should be greater than or equal to 1
export layout=mmpretrian -> layout=mmpretrian: input should be 'official', 'timm', 'mmpretrain', 'mmsegmentation'
export formt=pth -> did you mean 'format'?
table3 format=html -> format=html: input should be 'auto', 'text', 'markdown', 'json' or 'csv'
data chek data.root=/nowhere -> did you mean 'check'?
data check data.root=/nowhere worker=2 -> did you mean 'workers'?
data demo out=/nowhere seed=zero -> seed=zero: input should be a valid integer
data prepare archives=/nowhere out=/nowhere/out verify=maybe -> verify=maybe: input should be a valid boolean
data shard data.root=/nowhere out=/nowhere/out images_per_shards=5 -> did you mean 'images_per_shard'?
"""


def explain_options(place: Place) -> dict[str, Any]:
    """Every experiment composes and its network can be built; every mistake is a line with the valid name or type."""
    claims = Claims()
    names = sorted(path.stem for path in (find_conf() / "experiment").glob("*.yaml"))
    mistakes = MISTAKES.strip().splitlines()
    for name in names:
        # Fine-tuning is refused without a start.
        overrides = ["data.root=/nowhere", "train.init_from=official:resnest50", f"+experiment={name}"]
        with initialize_config_dir(str(find_conf()), version_base="1.3"):
            config = check_config(compose("train", overrides), TrainConfig)
        recipe = config.train
        if not isinstance(recipe, ClassificationRecipe):
            continue
        with torch.device("meta"):
            model = build_model(config.model.name, 1000, recipe.dropout, recipe.zero_gamma, init=recipe.init)
            DropBlock(model).set_probability(recipe.dropblock)
            logits = model.train()(torch.empty(2, 3, recipe.crop, recipe.crop))
        claims.add(logits.shape == (2, 1000), f"{name}: logits of shape {tuple(logits.shape)}")
    calls, expected = zip(*(line.split(" -> ") for line in mistakes), strict=True)
    commands = [each.partition(" ")[0] for each in calls]
    answers = call(place, *(f"{each} {VALID[command]}" for each, command in zip(calls, commands, strict=True)))
    for each, command, text, (code, lines) in zip(calls, commands, expected, answers, strict=True):
        is_line = len(lines) == 1 and lines[0].startswith(f"resnest-{command}: ")
        claims.add(code == 2 and is_line, f"{each}: exit code {code}, {lines}")
        claims.add(text in " ".join(lines), f"{each}: {lines} instead of {text!r}")
    claims.require()
    return {"experiments": len(names), "mistakes": len(mistakes)}
