"""Local and remote files.

paths      local and remote paths, read alike
atomic     files that are replaced completely or not at all
staging    images that get their name when they are complete
lock       one run at a time
"""
