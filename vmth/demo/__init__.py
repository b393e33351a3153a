# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a guest that checks itself is moved live, and everything about it is reported.

An application on the public API of ``vmth``, as an embedder would write it. Read in this order:
settings (what may be chosen), guests (the wrappers that carry the guest's own record along),
arrival (the destination's end), run (the three ways to run it), report (what is said at the end).
"""
