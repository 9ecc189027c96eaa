"""Training of a user's own model: one loop that resumes exactly, on one device or sharded over several processes.

`Trainer` trains a model on batches that are a function of the step; `TrainConfig` holds its options.
`flow_matching_batch` and `flow_matching_loss` make the objective of rectified-flow models such as Wan, and `vae_loss`
makes the objective of their autoencoders.
"""

from turbocompile.training.checkpoint import read_weights
from turbocompile.training.config import TrainConfig
from turbocompile.training.losses import flow_matching_batch, flow_matching_loss, vae_loss
from turbocompile.training.parallel import init_distributed
from turbocompile.training.trainer import Batch, Result, Trainer, step_generator

__all__ = [
    "Batch",
    "Result",
    "TrainConfig",
    "Trainer",
    "flow_matching_batch",
    "flow_matching_loss",
    "init_distributed",
    "read_weights",
    "step_generator",
    "vae_loss",
]
