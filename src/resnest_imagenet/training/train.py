"""A run, from its configuration to its checkpoints, in the order of its life."""

from contextlib import ExitStack

import torch

from resnest_imagenet import distributed
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.supervision import STARTING, supervise
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.batch_size import agree_on_batch, is_auto, open_fitting
from resnest_imagenet.training.control import Control
from resnest_imagenet.training.determinism import fix_workspace, fixing_kernels
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.log import RunLog
from resnest_imagenet.training.loop import end_epoch, train_epoch
from resnest_imagenet.training.optimizer import require_head
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import Saver
from resnest_imagenet.training.schedule import StepPlan, count_accumulation, plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import StopRequest
from resnest_imagenet.training.trace import Trace
from resnest_imagenet.training.trackers import require_trackers
from resnest_imagenet.training.wrapping import choose_operators, wrap


def train(config: TrainConfig) -> TrainingState:
    """Train, or resume from the run folder's newest checkpoint; return the final state.

    Raises:
        UserError: a user's error, in one line.
        Stopped: after a signal, with a checkpoint.
    """
    is_main = distributed.launched_as().rank == 0
    run = RunFolder(config.run_dir, config.checkpoint.keep, is_main)
    with StopRequest(speaks=is_main) as request, run.opened(), ExitStack() as stack:
        # 1. What can be refused before the ranks meet: options, then data.
        chooses_batch = is_auto(config)
        task, plan, device = prepare(config)
        config, recipe = task.config, task.config.train
        stack.enter_context(fixing_kernels(recipe.deterministic))
        # 2. The other ranks. Trackers are closed after the ranks have left the group: closing may wait for a server.
        trackers = stack.enter_context(ExitStack())
        trace = stack.enter_context(Trace(run.path))
        ranks = stack.enter_context(distributed.join(device, config.timeout_seconds))
        if chooses_batch:
            task, plan = agree_on_batch(task, plan, ranks)
            config = task.config
        batches = task.plan_batches(plan.steps_per_epoch * plan.accumulation * ranks.world_size, ranks)
        trace.begin(batches)
        request.before_leaving = trace.close
        on_abort = trace.closing_after(run.write_end)
        watch = stack.enter_context(supervise(ranks, config.timeout_seconds, on_abort, trace.note))
        # 3. The validation set: this rank's share.
        evaluate = task.build_evaluation(ranks)
        # 4. The network, the same on every rank, and all that changes with it: new, or from the newest checkpoint. The
        # training set comes after the choice of its loader.
        saver = Saver.of(run, ranks, task, plan, tick=lambda: watch.then(STARTING))
        saved = saver.find(config.checkpoint.on_mismatch)
        model = task.build_model(saved is None, device)
        choices = choose_operators(model, task, ranks, saver, saved)
        loader = task.build_loader(batches, ranks)
        state = TrainingState(model, recipe, task.head)
        if saved is not None:
            if saver.restore(state, loader, saved):
                return state
            del saved  # as large as the state
        run.begin(config.model_dump(), ranks, state.step or None, choices)
        trace.report_last_attempt(task.train_set, task.val_set)
        log = stack.enter_context(RunLog(run.path, plan, task, state, ranks, trackers))
        network = wrap(state.model, task, ranks)
        # 5. The epochs, to the end or to a signal.
        with Health(state, recipe) as health:
            control = Control(ranks, watch, request, health, log, saver, config.checkpoint.every_steps)
            request.wait_for_step()
            state.epoch = plan.find_epoch(state.step, state.epoch)
            with control.saving_before_leaving(state, loader):
                while state.epoch < plan.epochs and not state.has_stalled:
                    train_epoch(state, network, task, loader, plan, control)
                    end_epoch(state, task, loader, plan, evaluate, control)
        ending = {"reason": f"train.patience={recipe.patience}"} if state.epoch < plan.epochs else {}
        run.write_status("finished", exit_code=0, **state.describe_progress(), metric=task.metric, **ending)
        log.result(state)
    return state


def prepare(config: TrainConfig) -> tuple[Task, StepPlan, torch.device]:
    """Refuse what can be refused before the ranks meet: options first, then the data; nothing is written.

    Returns:
        The task, the steps of the run, and this rank's device.
    """
    world_size = distributed.launched_as().world_size
    require_trackers(config.log.trackers)
    if not is_auto(config):
        count_accumulation(config.train, world_size)
    if config.train.deterministic:
        fix_workspace()
    device = distributed.choose_device(config.device)
    task = open_fitting(open_task, config, device)
    require_head(config.train, task.head)
    return task, plan_steps(len(task.train_set), task.config.train, world_size), device
