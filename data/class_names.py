"""Readable names of classes. Imports nothing heavy before they are needed."""

import functools
import re
from collections import Counter


@functools.cache
def imagenet_names():
    """{WordNet number: name} of all ImageNet classes, such as {"n02099601": "golden retriever"}. The first 1000 are those
    of ILSVRC 2012 in the order of their labels, with torchvision's names; the others have WordNet's first terms."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    thousand = dict(zip(ImageNetInfo().label_names(), ResNet50_Weights.IMAGENET1K_V1.meta["categories"], strict=True))
    terms = ImageNetInfo("imagenet-21k-goog").label_descriptions(as_dict=True)
    return thousand | {number: text.split(",")[0] for number, text in terms.items() if number not in thousand}


def readable_names(folders):
    """A name for each class's folder: its own; but where all folders are called by WordNet numbers that ImageNet has, their
    names, which are followed by the number where several classes have the same."""
    if not all(re.fullmatch(r"n\d{8}", folder) and folder in imagenet_names() for folder in folders):
        return list(folders)
    names = [imagenet_names()[folder] for folder in folders]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
