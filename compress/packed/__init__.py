"""The kinds of packed weight: one file a kind, one line here."""

from compress.packed.affine import Affine
from compress.packed.bilevel import BiLevel
from compress.packed.blockwise import Blockwise
from compress.packed.codebook import Codebook
from compress.packed.dense import Dense
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.types import Packed

KINDS: dict[str, type[Packed]] = {
    UniformGrid.kind: UniformGrid,
    Affine.kind: Affine,
    BiLevel.kind: BiLevel,
    Blockwise.kind: Blockwise,
    Codebook.kind: Codebook,
    Dense.kind: Dense,
    OutlierColumns.kind: OutlierColumns,
    Outliers.kind: Outliers,
    Sparse.kind: Sparse,
}
