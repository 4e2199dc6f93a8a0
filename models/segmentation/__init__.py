"""Segmentation from image tags alone (arXiv 1612.01991): features, localization, sampling, a classifier of pixels."""

from .backbones import Backbone, Features
from .cache import FeatureCache
from .configuration import SegmentConfig
from .data import TaggedImages
from .segmenter import Segmenter, fit

__all__ = ["Backbone", "FeatureCache", "Features", "SegmentConfig", "Segmenter", "TaggedImages", "fit"]
