"""Loaders for the public layouts of image collections that torchvision does not know: an ImageSet with labels (n, L) each."""

from training.datasets.flickr25k import load_flickr25k
from training.datasets.nus_wide import load_nus_wide

__all__ = ["load_flickr25k", "load_nus_wide"]
