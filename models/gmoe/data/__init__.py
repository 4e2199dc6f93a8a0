"""Images in several domains: their interface, digits and letters drawn here, and folders of one's own.

``domains`` has the interface that training and evaluation see, ``splits`` DomainBed's seeds and splits,
``digits`` four domains of real handwritten digits, ``letters`` drawn letters to pretrain on, ``folders`` the
data sets of DomainBed on disk and ``checking`` the decoding of every image before training starts.
"""

from .domains import Domains

__all__ = ["Domains"]
