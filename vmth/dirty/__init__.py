# SPDX-License-Identifier: Apache-2.0
"""Dirty sources: Python faces of csrc/sys."""
