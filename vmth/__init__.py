# SPDX-License-Identifier: Apache-2.0
"""vmth: the page-transfer core that moves running virtual machines between hosts."""

__version__ = "0.1.0"
