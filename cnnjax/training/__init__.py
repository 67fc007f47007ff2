"""Training: one pure jitted step, evaluation, optimizers, checkpoints, data parallelism, a loop.

Usage::

    from cnnjax import models, training

    model = models.create("resnet20_cifar", num_classes=10, rngs=nnx.Rngs(0))
    rate = training.build_schedule(
        training.ScheduleConfig("cosine", base=0.1, warmup=5),
        total_steps=steps, steps_per_epoch=per_epoch)
    optimizer = training.build_optimizer(
        training.OptimizerConfig("sgd", nesterov=True, weight_decay=1e-4), rate)
    # a pruning method is one more optax transformation:  optax.chain(optimizer, masked(...))

    network, state = training.create_state(model, optimizer, seed=0)
    step = training.make_train_step(
        network, optimizer, learning_rate=rate,
        config=training.StepConfig(accumulate=1),
        hooks=training.Hooks(loss=training.classification_loss(0.1)))
    test = training.make_eval_step(network)

    result = training.fit(
        step, state, train_iterator,            # dicts {"image": (n, h, w, c), "label": (n,)}
        training.FitConfig(total_steps=steps, eval_every=500, checkpoint_every=500),
        workdir=workdir,                        # resumes from here, exactly
        evaluate=lambda s: training.evaluate(test, s, test_batches()))
    trained = training.state_to_model(network, result.state)       # an NNX module again

Hooks (`Hooks`) are what later methods plug in: ``loss(model, batch, context) -> (scalar,
metrics)`` for distillation; ``penalty(params, context)`` for sparsity penalties;
``reparam(params, context) -> params`` for masks, gates and quantizers (``params`` of the state may
then be any pytree: pass ``create_state(params=...)``); ``prepare(batch, key, train)`` for
work on the batch on the device; ``post_update(state, context, metrics)`` for projections.
``context.extra`` is the state's free slot (``create_state(extra=...)``), saved in checkpoints.
"""

from __future__ import annotations

from cnnjax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    Restored,
    check_workdir,
)
from cnnjax.training.compile_cache import default_cache_dir, enable_compilation_cache
from cnnjax.training.evaluation import evaluate, make_eval_step, recalibrate_batchnorm
from cnnjax.training.loop import FitConfig, FitResult, fit
from cnnjax.training.losses import (
    classification_loss,
    label_rank,
    softmax_cross_entropy,
    weighted_mean,
)
from cnnjax.training.mesh import (
    data_mesh,
    initialize_distributed,
    pad_batch,
    replicate,
    shard_batch,
)
from cnnjax.training.metrics import JsonlWriter, Progress, read_jsonl
from cnnjax.training.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    path_mask,
)
from cnnjax.training.runlog import NonFiniteLossError, Preempted
from cnnjax.training.state import (
    Network,
    TrainState,
    averaged,
    create_state,
    derive_rngs,
    model_stats,
    set_mode,
    split_network,
    state_to_model,
)
from cnnjax.training.step import Context, Hooks, StepConfig, TrainStep, make_train_step

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "Checkpointer",
    "Context",
    "FitConfig",
    "FitResult",
    "Hooks",
    "JsonlWriter",
    "Network",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Preempted",
    "Progress",
    "Restored",
    "ScheduleConfig",
    "StepConfig",
    "TrainState",
    "TrainStep",
    "averaged",
    "build_optimizer",
    "build_schedule",
    "check_workdir",
    "classification_loss",
    "create_state",
    "data_mesh",
    "default_cache_dir",
    "derive_rngs",
    "enable_compilation_cache",
    "evaluate",
    "fit",
    "initialize_distributed",
    "label_rank",
    "make_eval_step",
    "make_train_step",
    "model_stats",
    "pad_batch",
    "path_mask",
    "read_jsonl",
    "recalibrate_batchnorm",
    "replicate",
    "set_mode",
    "shard_batch",
    "softmax_cross_entropy",
    "split_network",
    "state_to_model",
    "weighted_mean",
]
