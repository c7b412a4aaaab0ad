"""Pictures: traversals of a model's flows, paths and potentials in latent space, animations.

Grids and frames are NumPy arrays; figures are `matplotlib.figure.Figure` objects of their own, untouched by pyplot's
global state. Matplotlib and Pillow come with the extra ``plot`` and are imported where they are first needed.
"""

from flowfactor.plot.composition import grid_frames, traverse_grid, traverse_grid_figure
from flowfactor.plot.files import save, to_gif
from flowfactor.plot.grid import strips
from flowfactor.plot.latent import potential_surface, trajectories
from flowfactor.plot.traversal import traversal_frames, traverse, traverse_figure

__all__ = [
    "grid_frames",
    "potential_surface",
    "save",
    "strips",
    "to_gif",
    "trajectories",
    "traversal_frames",
    "traverse",
    "traverse_figure",
    "traverse_grid",
    "traverse_grid_figure",
]
