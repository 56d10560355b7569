"""Files, local and remote: where they lie, and how they appear whole or not at all.

paths      local and remote paths, read alike
atomic     files that are replaced whole
staging    folders that appear when they are complete
lock       one run at a time
"""
