"""Image sequences in which one transformation acts: what models are trained on.

Every data set gives items ``{"frames": [T+1, C, H, W] in [0, 1], "k": int, "t": [T+1]}``, batches of them, stratified
epochs and resumable loaders; see `SequenceDataset`.
"""

from __future__ import annotations

from flowfactor._datasets import register_dataset
from flowfactor.data.base import SequenceDataset
from flowfactor.data.colours import colour, hue_to_rgb, shift_hue
from flowfactor.data.combined import CombinedImages, CombinedScenes
from flowfactor.data.compose import Compose
from flowfactor.data.densities import Banana, EightGaussians, KnownDensity, PlanarMixture, TwoMoons
from flowfactor.data.factors import FactorSequences
from flowfactor.data.loader import SequenceLoader
from flowfactor.data.mixing import COMBINED_MODES, CombinedSequences, weights_schedule
from flowfactor.data.raycast import SCENE_SHAPES
from flowfactor.data.readers.digits import Digits
from flowfactor.data.readers.dsprites import DSprites
from flowfactor.data.readers.idx import read_idx
from flowfactor.data.readers.mnist import MNIST, MNIST_MD5, MNIST_MIRRORS, paper_transforms
from flowfactor.data.readers.norb import SmallNORB
from flowfactor.data.readers.rendered import Falcor3D, Isaac3D
from flowfactor.data.readers.sequences import Sequences
from flowfactor.data.readers.shapes3d import Shapes3D
from flowfactor.data.render import SCENE_FACTORS, VIEW_FACTORS, render_scenes
from flowfactor.data.scenes import Scenes
from flowfactor.data.transformed import TransformedImages
from flowfactor.data.transforms import (
    Geometric,
    Hue,
    Perspective,
    Rotate,
    Scale,
    Transform,
    Translate,
)

__all__ = [
    "COMBINED_MODES",
    "MNIST",
    "MNIST_MD5",
    "MNIST_MIRRORS",
    "SCENE_FACTORS",
    "SCENE_SHAPES",
    "VIEW_FACTORS",
    "Banana",
    "CombinedImages",
    "CombinedScenes",
    "CombinedSequences",
    "Compose",
    "DSprites",
    "Digits",
    "EightGaussians",
    "FactorSequences",
    "Falcor3D",
    "Geometric",
    "Hue",
    "Isaac3D",
    "KnownDensity",
    "Perspective",
    "PlanarMixture",
    "Rotate",
    "Scale",
    "Scenes",
    "SequenceDataset",
    "SequenceLoader",
    "Sequences",
    "Shapes3D",
    "SmallNORB",
    "Transform",
    "TransformedImages",
    "Translate",
    "TwoMoons",
    "colour",
    "hue_to_rgb",
    "paper_transforms",
    "read_idx",
    "register_dataset",
    "render_scenes",
    "shift_hue",
    "weights_schedule",
]
