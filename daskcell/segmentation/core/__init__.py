"""What makes blocks exact: global tiles, flows followed in global coordinates, ownership, and the checks.

tiles, rescale      the one grid of network tiles over the whole image, and resampling onto it
dynamics            pixels along the flows to their cells
ownership           which cells are a block's own
cells, flowcheck    flow check, holes, size; ids; painting
seams               the seam report: did cutting the image into blocks leave a trace?

Pure functions of arrays and boxes; nothing here knows a method, Dask or files of a study.
"""
