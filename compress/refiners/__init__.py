"""The refiners: steps that tune the packed layers of a whole block. One file a refiner, one line in REFINERS."""
