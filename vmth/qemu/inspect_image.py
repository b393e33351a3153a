# SPDX-License-Identifier: Apache-2.0
"""``vmth inspect`` for files that are images of saved VMs, and for those that are streams.

An image's head and state are the begin and the end of a stream, and are looked at as such; what it
holds between them is counted from its index. The whole file is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmth.errors import StreamError, UsageError
from vmth.qemu.image import Image, digest_text, is_image
from vmth.qemu.inspect import ImageReport, Inspector, Report, inspect_files
from vmth.qemu.ram import PageKind

__all__ = ["inspect_image", "inspect_stored"]


def inspect_stored(paths: Sequence[Path]) -> Report:
    """Inspect one image, or one stream with its multifd channels. Raises as ``inspect_files``."""
    for path in paths:
        if path.is_fifo() or path.is_socket() or path.is_char_device():
            raise UsageError(f"{path} is no file, allowed is one: it is read more than once")
    images = [path for path in paths if _is_image(path)]
    if not images:
        return inspect_files(paths)
    if len(paths) != 1:
        raise UsageError(f"an image and {len(paths) - 1} more files, allowed is one image alone")
    return inspect_image(images[0])


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return is_image(file.read(8))


def inspect_image(path: Path) -> Report:
    """What is damaged is in the report's ``faults``."""
    report = Report(str(path), nbytes=path.stat().st_size)
    try:
        with Image.open(path) as image:
            report = _stream_report(image)
            _count_pages(report, image)
            report.image = _image_report(image)
            image.verify()
    except StreamError as error:
        report.faults.append(str(error))
    return report


def _stream_report(image: Image) -> Report:
    """Of the stream that the image would be, without its pages."""
    data = image.head + b"".join(image.state())
    report = Inspector(str(image.path), memoryview(data)).run()
    report.nbytes = image.end.file_bytes
    said = [(block.idstr, block.used_length) for block in image.blocks]
    listed = [(block.idstr, block.used_length) for block in report.blocks]
    if said != listed:
        report.faults.append(f"blocks: the stream's begin lists {listed}, the image {said}")
    return report


def _count_pages(report: Report, image: Image) -> None:
    runs = image.index.runs
    for kind in (PageKind.ZERO, PageKind.PAGE):
        of_kind = runs[runs["kind"] == kind]
        for number, block in enumerate(report.blocks):
            npages = int(of_kind["npages"][of_kind["block"] == number].sum(dtype=np.uint64))
            name = kind.name.lower()
            if npages:
                block.pages[name] = npages
                report.pages[name] = report.pages.get(name, 0) + npages
    report.page_payload_bytes = image.end.normal_pages * image.page_bytes


def _image_report(image: Image) -> ImageReport:
    meta, end = image.meta, image.end
    return ImageReport(
        version=image.version,
        name=meta.name,
        uuid=meta.uuid,
        created_unix_ns=meta.created_unix_ns,
        qemu_version=meta.qemu_version,
        vmth_version=meta.vmth_version,
        running=meta.running,
        live=meta.live,
        page_bytes=meta.page_bytes,
        memory_bytes=meta.memory_bytes,
        frames=end.frames,
        superseded_pages=end.superseded_pages,
        absent_pages=meta.memory_bytes // meta.page_bytes - end.digest_pages,
        digest=digest_text(end.digest_lo, end.digest_hi, end.digest_pages),
    )
