# SPDX-License-Identifier: Apache-2.0
"""The compiled modules. Import their faces instead: vmth.kernels, vmth.dirty, vmth.channel, vmth.guests."""
