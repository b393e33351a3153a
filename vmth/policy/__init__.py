# SPDX-License-Identifier: Apache-2.0
"""Pure decisions: when to switch over, throttle, give up. Time is an argument."""
