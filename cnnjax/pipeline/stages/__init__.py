"""The stages; importing this registers them. One module a stage, one line here."""

from __future__ import annotations

from cnnjax.pipeline.stages.branches import Branches
from cnnjax.pipeline.stages.channels import Channels
from cnnjax.pipeline.stages.compact import CompactMaps
from cnnjax.pipeline.stages.compress import DeepCompression
from cnnjax.pipeline.stages.constrain import Constrain
from cnnjax.pipeline.stages.distill import Distill, KeepTeacher, RecallTeacher
from cnnjax.pipeline.stages.factorize import Factorize, LayerRule
from cnnjax.pipeline.stages.fisher_distill import FisherDistill
from cnnjax.pipeline.stages.layerwise import Layerwise
from cnnjax.pipeline.stages.penalized import Penalized, Regrow
from cnnjax.pipeline.stages.pretrain_blocks import PretrainBlocks
from cnnjax.pipeline.stages.pretrained import Pretrained
from cnnjax.pipeline.stages.prune import Prune
from cnnjax.pipeline.stages.quantize import Quantize
from cnnjax.pipeline.stages.reconstruct import Reconstruct
from cnnjax.pipeline.stages.select import Select
from cnnjax.pipeline.stages.slimming import Slimming
from cnnjax.pipeline.stages.sparse_training import (
    Gates,
    Proximal,
    ShrinkDead,
    Surgery,
    Threshold,
)
from cnnjax.pipeline.stages.tickets import Tickets
from cnnjax.pipeline.stages.train import Train

__all__ = [
    "Branches",
    "Channels",
    "CompactMaps",
    "Constrain",
    "DeepCompression",
    "Distill",
    "Factorize",
    "FisherDistill",
    "Gates",
    "KeepTeacher",
    "LayerRule",
    "Layerwise",
    "Penalized",
    "PretrainBlocks",
    "Pretrained",
    "Proximal",
    "Prune",
    "Quantize",
    "RecallTeacher",
    "Reconstruct",
    "Regrow",
    "Select",
    "ShrinkDead",
    "Slimming",
    "Surgery",
    "Threshold",
    "Tickets",
    "Train",
]
