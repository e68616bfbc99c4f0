"""Which documents are held out for evaluation: the document's id alone decides.

The rule needs no list and no order, so the training of the tiny model, the collection of training tokens and that of
held-out tokens agree on it without communicating, on any machine.
"""

import hashlib


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document belongs to the held-out share (between 0 and 1) of all documents.

    Ids that differ only after a `#` fall on the same side: the parts of one whole (such as the docstrings of one
    module) are never split between training and evaluation.
    """
    family = document_id.split("#", 1)[0]
    digest = hashlib.blake2b(family.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
