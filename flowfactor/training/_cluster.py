"""Who a process is among those of a training: its settings say so, and no variable that a job left in its environment."""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from flowfactor.training.config import TrainConfig


def trains_alone(train: TrainConfig) -> bool:
    """Whether a training has one process: that of one device of one node.

    Args:
        train: Its settings.

    Returns:
        Whether it does.

    Example:
        >>> trains_alone(TrainConfig()), trains_alone(TrainConfig(devices=2)), trains_alone(TrainConfig(num_nodes=2))
        (True, False, False)
    """
    return train.devices == train.num_nodes == 1


def settle(train: TrainConfig) -> None:
    """Makes a process that trains alone the first one, which writes.

    Lightning takes a process for another one as soon as it is imported, where a cluster's job or a launcher has left
    SLURM_PROCID, RANK or LOCAL_RANK in the environment. With several processes, its Trainer says which one this is.

    Args:
        train: The settings of the training.
    """
    if trains_alone(train):
        rank_zero_only.rank = 0


def environments(train: TrainConfig) -> list[ClusterEnvironment]:
    """What to tell Lightning's Trainer of the cluster: nothing, so that it looks by itself, unless a process trains alone.

    Args:
        train: The settings of the training.

    Returns:
        Plugins of the Trainer.
    """
    return [LightningEnvironment()] if trains_alone(train) else []
