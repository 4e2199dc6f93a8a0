"""Images: in several domains, digits and letters drawn here, and in folders of one's own.

``domains`` has the interface that training and evaluation see, ``splits`` DomainBed's seeds and splits,
``digits`` four domains of real handwritten digits, ``letters`` drawn letters to pretrain on, ``folders`` the
data sets of DomainBed on disk, ``images`` what every data set on disk needs, ``rgb`` images of any mode as RGB,
``checking`` the decoding of every image before training starts and ``batches`` the loading of some, each augmented from
its own seed.
"""

from .domains import Domains

__all__ = ["Domains"]
