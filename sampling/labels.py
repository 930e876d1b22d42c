"""Classes by number, name or WordNet number (n02099601 is "golden retriever")."""

import re

from data import class_names
from runtime.errors import UserError


def readable_names(recorded, num_classes):
    """Names of the classes by number, a list: what the checkpoint records, where WordNet numbers are replaced by names;
    ImageNet's names for 1000 classes without a record; else empty."""
    if recorded is None and num_classes == 1000:
        return list(class_names.imagenet_names().values())[:1000]
    return class_names.readable_names((recorded or [])[:num_classes])


def parse_labels(words, names, num_classes):
    """Class numbers, a list of int, of words that are numbers, names or WordNet numbers. names: of `readable_names`. Raises
    UserError, with the way out."""
    labels, highest = [], max(num_classes - 1, 0)
    for word in words:
        if re.fullmatch(r"-?\d{1,18}", word):
            if not 0 <= int(word) <= highest:
                raise UserError(f"--labels {word}: out of range, the model's classes are 0 to {highest}")
            labels.append(int(word))
            continue
        wanted = (class_names.imagenet_names().get(word, word) if re.fullmatch(r"n\d{8}", word) else word).lower()
        found = [number for number, name in enumerate(names) if name.lower() in (wanted, f"{wanted} ({word})")]
        if len(found) != 1:
            near = [f"{number} ({name})" for number, name in enumerate(names) if wanted in name.lower()][:5]
            hint = f"; did you mean {', '.join(near)}?" if near else "; give its number"
            raise UserError(f"--labels {word}: {'several classes are' if found else 'no class is'} called that{hint}")
        labels += found
    return labels
