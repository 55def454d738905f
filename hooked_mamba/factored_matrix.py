"""A product A B of two matrices that is kept factored; its rank is at most the inner width."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.names_elsewhere import advice
from hooked_mamba.transformerlens_names import FACTORED


class FactoredMatrix:
    """A B with A ... m r and B ... r n; leading axes broadcast. Names as in TransformerLens.

    Norm, singular values and eigenvalues are computed at the cost of the inner width r, not of m and n.
    """

    def __init__(self, A: Float[Tensor, "... m r"], B: Float[Tensor, "... k n"]) -> None:
        if A.shape[-1] != B.shape[-2]:
            raise ValueError(f"inner widths differ: A is {list(A.shape)}, B is {list(B.shape)}")
        lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A = A.expand(*lead, *A.shape[-2:])
        self.B = B.expand(*lead, *B.shape[-2:])
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.has_leading_dims = bool(lead)

    @property
    def shape(self) -> torch.Size:
        """Of the product."""
        return torch.Size((*self.A.shape[:-2], self.ldim, self.rdim))

    @property
    def ndim(self) -> int:
        """Axes of the product."""
        return len(self.shape)

    @property
    def AB(self) -> Float[Tensor, "... m n"]:
        """The product, multiplied out."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "... r r"]:
        """The other product, r x r (for m = n), which has the same eigenvalues except for zeros."""
        if self.ldim != self.rdim:
            raise ValueError(f"BA exists for square products only, this one is {self.ldim} x {self.rdim}")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Tensor | FactoredMatrix:
        """Times a vector (a vector), a matrix, or another factored matrix (factored, by the smaller inner width)."""
        if isinstance(other, FactoredMatrix):
            middle = self.B @ other.A
            if self.mdim > other.mdim:
                return FactoredMatrix(self.A @ middle, other.B)
            return FactoredMatrix(self.A, middle @ other.B)
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        if self.rdim != other.shape[-2]:
            raise ValueError(f"cannot multiply {list(self.shape)} with {list(other.shape)}")
        return FactoredMatrix(self.A, self.B @ other) if self.mdim <= self.rdim else FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> Tensor | FactoredMatrix:
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        if other.shape[-1] != self.ldim:
            raise ValueError(f"cannot multiply {list(other.shape)} with {list(self.shape)}")
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        """Times a number."""
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"only numbers multiply a factored matrix, got a tensor of shape {list(scalar.shape)}")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """By leading axes, or all of them and then rows and columns (as slices; an int keeps its axis)."""
        index = index if isinstance(index, tuple) else (index,)
        lead = self.ndim - 2
        if len(index) <= lead:
            return FactoredMatrix(self.A[index], self.B[index])
        if len(index) > lead + 2:
            raise IndexError(f"{len(index)} indices for {self.ndim} axes")
        front, (rows, *columns) = index[:lead], index[lead:]
        A = self.A[(*front, _kept(rows), slice(None))]
        B = self.B[(*front, slice(None), _kept(columns[0]) if columns else slice(None))]
        return FactoredMatrix(A, B)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U, S, Vh) with A B = U diag(S) Vh; by QR of both factors, so only the r x r core is decomposed."""
        Q, R = torch.linalg.qr(self.A)
        Q2, R2 = torch.linalg.qr(self.B.transpose(-2, -1))
        U, S, Vh = torch.linalg.svd(R @ R2.transpose(-2, -1), full_matrices=False)
        return Q @ U, S, Vh @ Q2.transpose(-2, -1)

    @property
    def U(self) -> Tensor:
        """Left singular vectors, ... m k."""
        return self.svd()[0]

    @property
    def S(self) -> Tensor:
        """Singular values, largest first."""
        return self.svd()[1]

    @property
    def Vh(self) -> Tensor:
        """Right singular vectors, ... k n."""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Tensor:
        """The r eigenvalues that need not be 0, ... r, complex."""
        return torch.linalg.eigvals(self.BA)

    def norm(self) -> Float[Tensor, "..."]:
        """Frobenius norm: |AB|^2 = tr(A^T A B B^T)."""
        gram = (self.A.transpose(-2, -1) @ self.A) * (self.B @ self.B.transpose(-2, -1))
        return gram.sum((-2, -1)).clamp(min=0).sqrt()

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        return self.A, self.B

    def make_even(self) -> FactoredMatrix:
        """The same product with the singular values shared evenly by both factors."""
        U, S, Vh = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root.unsqueeze(-2), root.unsqueeze(-1) * Vh)

    def collapse_l(self) -> Tensor:
        """S Vh: the product up to a rotation of its rows."""
        _, S, Vh = self.svd()
        return S.unsqueeze(-1) * Vh

    def collapse_r(self) -> Tensor:
        """U S: the product up to a rotation of its columns."""
        U, S, _ = self.svd()
        return U * S.unsqueeze(-2)

    def get_corner(self, k: int = 3) -> Tensor:
        """The first k rows and columns."""
        return self.A[..., :k, :] @ self.B[..., :, :k]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """A new leading axis."""
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def __getattr__(self, name: str) -> NoReturn:
        """Called only for unknown names; for TransformerLens' names the error says what to use here."""
        if name in FACTORED:
            raise AttributeError(advice(name, FACTORED))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, inner width {self.mdim})"


def _kept(index: Any) -> Any:
    """An int as a slice, so that factors stay matrices."""
    if not isinstance(index, int):
        return index
    return slice(index, index + 1) if index != -1 else slice(-1, None)
