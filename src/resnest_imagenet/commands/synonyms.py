"""The words of the field, and of other programs, for the options of this one.

Only words that are not themselves the last part of an option: `lr=0.1` is taken for train.lr without an entry here.
"""

# By the options that may be meant, of which the first that a command has counts: words as `normalise` returns them.
# "+name" is added to the configuration; a whole option=value is written as it is.
_WORDS = {
    # the data
    "data.root images": "data data_dir data_path",
    "data.root": "data_root dataset dataset_path imagenet",
    "data.train_dir": "train train_split",
    "data.val_dir": "val",
    "data.val_split": "valid_pct val_pct val_percent validation_split val_share test_size",
    "data.csv": "csv_file label_file labels annotations ann_file",
    "images": "image img url file",
    "images data.root": "input source",
    "loader.workers workers": "j num_workers threads",
    # the network
    "model": "a arch architecture backbone net network model_name",
    "model.num_classes": "classes nb_classes nc",
    "ckpt train.init_from": "checkpoint ckpt_path checkpoint_path load model_path",
    "train.init_from": "finetune init initial_checkpoint weights",
    "train.init_from ckpt": "pretrained",
    # the size of things
    "train.batch_size batch_size": "b batch bs",
    "train.crop crop": "img_size image_size imgsz input_size resolution size",
    "train.global_batch": "total_batch_size",
    # the steps
    "train.epochs": "max_epochs num_epochs n_epochs num_train_epochs",
    "train.steps": "max_steps iterations",
    "train.lr": "base_lr learning_rate lr0",
    "train.optimizer": "opt optim optimiser",
    "train.weight_decay": "wd decay",
    "train.schedule": "lr_schedule lr_scheduler sched scheduler",
    "train.step_epochs": "decay_epochs lr_step_size",
    "train.step_factor": "gamma lr_gamma",
    "train.warmup_epochs": "warmup lr_warmup_epochs",
    "train.clip_norm": "clip_grad clip_grad_norm gradient_clip_val max_grad_norm",
    "train.betas": "adam_betas",
    # the regularisation
    "train.label_smoothing": "smoothing",
    "train.mixup_alpha": "mixup",
    "train.cutmix_alpha": "cutmix",
    "train.dropout": "drop",
    "train.dropblock": "drop_block",
    "train.policy": "aa auto_augment augment",
    "train.jitter": "color_jitter",
    "train.erasing": "random_erase reprob",
    "train.ema_decay": "ema model_ema model_ema_decay",
    "train.drop_path": "drop_path_rate stochastic_depth stochastic_depth_prob",
    # fine-tuning
    "train.freeze": "freeze_at freeze_layers frozen_stages",
    "train.layer_decay": "llrd layer_lr_decay",
    "train.patience": "early_stop early_stopping early_stopping_patience",
    "train.class_weights": "class_weight",
    "train.flips=horizontal": "hflip fliplr",
    "train.flips=vertical": "vflip flipud",
    # the machine
    "train.precision=bf16 precision=bf16": "amp bf16",
    "train.precision=fp16 precision=fp16": "fp16 half",
    "train.precision precision": "amp_dtype dtype",
    "train.compile compile": "torchcompile",
    "device": "gpu",
    "seed": "random_seed",
    # what is written
    "+experiment": "experiment exp config cfg",
    "run_dir": "logdir log_dir",
    "run_dir out page": "output output_dir o",
    "run_dir out": "project save_dir work_dir workdir",
    "out run_dir": "save",
    "out": "results_file",
    "log.every_steps": "log_interval print_freq",
    "eval.every_epochs": "eval_freq",
    "checkpoint.every_steps": "save_freq",
    "log.trackers": "tracker logger",
    "log.trackers=tensorboard": "tensorboard",
    "log.trackers=wandb": "log_wandb use_wandb wandb",
    "log.trackers=mlflow": "mlflow",
    # predictions and explanations
    "score": "conf confidence score_threshold threshold",
    "top": "k topk top_k",
    "target": "class target_class",
    "layer": "target_layer",
}
# Options with a number where other programs have a switch: a usual value of it switched on, and that of it off.
SWITCHES = {
    "train.ema_decay": ("0.9999", "null"),
    "train.label_smoothing": ("0.1", "0"),
    "train.mixup_alpha": ("0.2", "0"),
    "train.cutmix_alpha": ("1.0", "0"),
}
SYNONYMS = {word: tuple(options.split()) for options, words in _WORDS.items() for word in words.split()}
# What has no option, and what to do.
ADVICE: dict[str, str] = {
    **dict.fromkeys(
        ("accum_steps", "accumulate_grad_batches", "gradient_accumulation_steps"),
        "a step accumulates up to train.global_batch=... images, in passes of train.batch_size",
    ),
    "resume": "a run resumes by the same command: write run_dir=... if it has another folder; others take ckpt=...",
    "devices": "start as many processes: torchrun --nproc-per-node 8 -m resnest_imagenet.commands.train ...",
    "gpus": "start as many processes: torchrun --nproc-per-node 8 -m resnest_imagenet.commands.train ...",
    "nproc_per_node": "it is torchrun's: torchrun --nproc-per-node 8 -m resnest_imagenet.commands.train ...",
    "local_rank": "torchrun tells each process its rank",
    "evaluate": "resnest-eval ckpt=... evaluates",
    "verbose": "there is one amount of output; log.every_steps=... says how often",
}


def normalise(word: str) -> str:
    """Return a word as the tables have it: the last part of a dotted name, in small letters, with underscores."""
    return word.rpartition(".")[2].lower().replace("-", "_")
