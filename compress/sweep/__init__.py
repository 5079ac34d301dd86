"""`compress sweep`: many settings of many methods on one model, and which of them to take."""
