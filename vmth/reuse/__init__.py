# SPDX-License-Identifier: Apache-2.0
"""Files whose pages a destination need not be sent, and the index of their contents
(docs/reuse.md).

``content`` reads a file as pages, ``build`` finds its contents, ``layout`` is the index on disk,
``index`` keeps it beside the file, ``warm`` opens several files for one migration.
"""
