# SPDX-License-Identifier: Apache-2.0
"""Guests that ship with vmth, each in a holder process: ``kvm`` (a micro-VM) and ``process``."""
