# SPDX-License-Identifier: Apache-2.0
"""The compiled modules. Their faces are vmth.kernels, vmth.dirty, vmth.channel, vmth.guests."""
