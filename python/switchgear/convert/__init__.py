# SPDX-License-Identifier: BSD-3-Clause
"""Conversions between dense and Mixture-of-Experts models; docs/conversion.md explains them.

To experts:    upcycle, split_dense
Parts:         FeedForward, feed_forward; Partition, partition, neuron_importance; EqualTopK, prior_approximate
"""

from switchgear.convert.ffn import FeedForward, feed_forward
from switchgear.convert.gates import EqualTopK, prior_approximate
from switchgear.convert.partitions import Partition, balanced_kmeans, neuron_importance, partition
from switchgear.convert.result import Conversion, Converted
from switchgear.convert.split import split_dense
from switchgear.convert.upcycle import upcycle

__all__ = [
    "Conversion",
    "Converted",
    "EqualTopK",
    "FeedForward",
    "Partition",
    "balanced_kmeans",
    "feed_forward",
    "neuron_importance",
    "partition",
    "prior_approximate",
    "split_dense",
    "upcycle",
]
