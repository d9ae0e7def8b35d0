"""Read image sets as tensors, fetch the published ones, and augment batches without hidden state.

`load` reads a set by name, `get` puts a published set on this machine, `available` lists what is here, and
`Augment` changes training images by noise that depends on the seed and the example alone.
"""

from bitquorum.data.augment import Augment
from bitquorum.data.catalog import Listing, available, load
from bitquorum.data.fetch import get, install
from bitquorum.data.imageset import Batch, ImageSet
from bitquorum.data.sources import NAMES, SOURCES, Download, PublishedFile, Source, data_root

__all__ = [
    "NAMES",
    "SOURCES",
    "Augment",
    "Batch",
    "Download",
    "ImageSet",
    "Listing",
    "PublishedFile",
    "Source",
    "available",
    "data_root",
    "get",
    "install",
    "load",
]
