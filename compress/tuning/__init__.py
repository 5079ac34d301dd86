"""Tuning a packed checkpoint from end to end: codes stay, their scales and the gains of norms learn the original's
predictions. One file: what of a layer moves (scaled), the two models (whole), the descent and the new folder (tune)."""
