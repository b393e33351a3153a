# SPDX-License-Identifier: Apache-2.0
"""The cheaper forms of a page by name: what two ends agree on, and masks for the native ends.

A form's name is its feature in Offer and Accept (``docs/protocol.md``); bit f of a mask stands for
form f. normal, zero, hole and free are not among them: every end takes those.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmth.errors import UsageError
from vmth.packet import PageForm

__all__ = ["BASED_FORMS", "FORM_NAMES", "agreed_forms", "forms_mask"]

_FORMS = {
    "same": PageForm.SAME,
    "dedup": PageForm.DEDUP,
    "delta": PageForm.DELTA,
    "zstd": PageForm.ZSTD,
    "reuse": PageForm.REUSE,
}
#: What this release speaks.
FORM_NAMES: tuple[str, ...] = tuple(_FORMS)
#: Made from what has landed: a destination that hands pages on and keeps none cannot take them.
BASED_FORMS = ("dedup", "delta")


def forms_mask(names: Iterable[str]) -> int:
    """Raises UsageError for a name that is not in FORM_NAMES."""
    mask = 0
    for name in names:
        if name not in _FORMS:
            raise UsageError(f"form: received {name!r}, allowed {', '.join(FORM_NAMES)}")
        mask |= 1 << _FORMS[name]
    return mask


def agreed_forms(features: Iterable[str]) -> int:
    """The mask of the forms among ``Accept.features``; other features do not matter here."""
    return forms_mask(name for name in features if name in _FORMS)
