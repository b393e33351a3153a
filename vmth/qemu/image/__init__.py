# SPDX-License-Identifier: Apache-2.0
"""Saved VMs as files: format, writer, reader (docs/images.md)."""

from vmth.atomic import AtomicFile
from vmth.qemu.image.codec import DEFAULT_LEVEL, MAX_LEVEL, check_level
from vmth.qemu.image.digest import FrameDigest, digest_text
from vmth.qemu.image.frames import Frame
from vmth.qemu.image.layout import End, is_image
from vmth.qemu.image.meta import Meta, SavedBlock
from vmth.qemu.image.reader import Image
from vmth.qemu.image.writer import ImageWriter, WriterStats

__all__ = [
    "DEFAULT_LEVEL",
    "MAX_LEVEL",
    "AtomicFile",
    "End",
    "Frame",
    "FrameDigest",
    "Image",
    "ImageWriter",
    "Meta",
    "SavedBlock",
    "WriterStats",
    "check_level",
    "digest_text",
    "is_image",
]
