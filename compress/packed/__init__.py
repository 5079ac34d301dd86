"""The kinds of packed weight: one file a kind, one line here."""

from compress.packed.uniform import UniformGrid

KINDS: dict[str, type[UniformGrid]] = {
    UniformGrid.kind: UniformGrid,
}
