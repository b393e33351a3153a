# SPDX-License-Identifier: Apache-2.0
"""QEMU: its migration stream (``stream``, without I/O) and what is built on it."""
