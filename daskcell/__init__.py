"""daskcell: from microscope images to every cell segmented, described and clustered by type.

    import daskcell as dc

    image = dc.open_image("slide.svs")                      # lazy (C, Y, X)
    picture = dc.adjust_histogram(image.data)
    labels = dc.segment(picture)                            # lazy (Y, X), the same cells for any chunks
    cells = dc.measure(labels, picture)                     # a row a cell
    features = dc.embed(picture, labels, encoder="tiny")
    model = dc.fit_clusters(features, k=11)
    colours = dc.overlay(picture, labels, model.predict(features))

or all of it, disk to disk, for one slide or thousands: ``dc.run(inputs, out)``, or ``daskcell run``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
