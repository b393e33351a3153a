# SPDX-License-Identifier: Apache-2.0
"""The protocol without I/O: messages, framing, and both state machines as tables."""
