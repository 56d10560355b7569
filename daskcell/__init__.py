"""daskcell: from microscope images to every cell segmented, described and clustered by type.

    import daskcell as dc

    image = dc.open_image("slide.svs")                      # lazy (C, Y, X)
    x = dc.prepare(image)                                   # colours and histogram
    labels = dc.segment(x)                                  # lazy (Y, X), the same cells for any chunks
    cells = dc.measure(labels, image)                       # DataFrame, one row per cell
    features = dc.embed(x, labels, encoder="tiny")
    model = dc.fit_clusters(features, k=11)
    overlay = dc.overlay(x, labels, model.predict(features))

or everything, from disk to disk, for one slide or thousands: ``study = dc.run(inputs, out)``, or
``daskcell run``. Errors and warnings are in `daskcell.errors`; ``docs/glossary.md`` explains the terms.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
