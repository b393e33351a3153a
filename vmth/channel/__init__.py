# SPDX-License-Identifier: Apache-2.0
"""Faces of csrc/xfer: the page channels, their sockets and options."""
