"""The arithmetic that second-order passes share: the Hessian's factor, loops over columns, masks, reference orders."""
