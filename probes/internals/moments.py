"""Means and covariances of two models' states on the same prompts, summed batch by batch, and statistics computed from them.

Debiased linear CKA (Nguyen et al. 2021, arXiv 2010.15327, after Song et al. 2012), RankMe (Garrido et al. 2023, arXiv
2210.02885) and the moments that a Gaussian null needs. Memory: three square matrices of the hidden width per state, in fp64,
for any number of prompts. Not covered: kernels other than the linear one.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Moments of pairs (x, y) of states. Moments with the same `origin` can be added.

    The origin (the first batch's mean) is subtracted from every state: results do not depend on it, but rounding does. Rows are kept
    until there are as many as the hidden width; from then on they are summed, and results come from the sums. With fewer rows,
    products of pairs of rows are cheaper. Everything is in fp64, because RankMe takes roots of small eigenvalues.
    """

    def __init__(self, origin: tuple[Float[Tensor, "states hidden"], Float[Tensor, "states hidden"]]):
        self.origin = {"x": origin[0], "y": origin[1]}
        self.count = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._added: dict[str, Tensor] = {}

    def add(self, x: Float[Tensor, "batch states hidden"], y: Float[Tensor, "batch states hidden"]) -> None:
        """Adds a batch; x and y are states at the same prompts."""
        if not len(x):
            return
        self.count += len(x)
        shifted = x - self.origin["x"]
        self._waiting.append((shifted, shifted if y is x else y - self.origin["y"]))
        if sum(len(rows) for rows, _ in self._waiting) >= x.shape[-1]:
            self._fold()

    @property
    def _sums(self) -> dict[str, Tensor]:
        self._fold()
        return self._added

    def _rows(self) -> dict[str, Float[Tensor, "states rows hidden"]] | None:
        """The rows, while there are no sums yet."""
        return None if self._added or not self._waiting else self._stacked()

    def _stacked(self) -> dict[str, Float[Tensor, "states rows hidden"]]:
        xs, ys = zip(*self._waiting, strict=True)
        x = torch.cat(xs).double().transpose(0, 1)
        return {"x": x, "y": x if ys[0] is xs[0] else torch.cat(ys).double().transpose(0, 1)}

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows = self._stacked()
        self._waiting = []
        length = {name: values.square().sum(-1) for name, values in rows.items()}
        for name, values in rows.items():
            self._add(name, values.sum(1))
            self._add(f"|{name}|", length[name].sum(1))
        for one, other in ("xx", "yy", "xy"):
            self._add(one + other, rows[one].mT @ rows[other])
            self._add(f"|{one}||{other}|", (length[one] * length[other]).sum(1))
        for one, other in ("xx", "yy", "xy", "yx"):
            self._add(f"|{one}|{other}", torch.einsum("sb,sbi->si", length[one], rows[other]))

    def _add(self, name: str, value: Tensor) -> None:
        self._added[name] = self._added[name].add_(value) if name in self._added else value.clone()

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both together; they must have the same origin."""
        result = Moments((self.origin["x"], self.origin["y"]))
        result.count = self.count + other.count
        for sums in (self._sums, other._sums):
            for name, value in sums.items():
                result._add(name, value.clone())
        return result

    def mean(self, which: str = "x") -> Float[Tensor, "states hidden"]:
        return self.origin[which].double() + self._sums[which] / self.count

    def covariance(self, which: str = "x") -> Float[Tensor, "states hidden hidden"]:
        mean = self._sums[which] / self.count
        return self._sums[which * 2] / self.count - torch.einsum("si,sj->sij", mean, mean)

    def rankme(self, which: str = "x") -> Float[Tensor, " states"]:
        """exp of the entropy of the centred states' singular values as shares of their sum: between 1 and the hidden width."""
        rows = self._rows()
        if rows is None:
            values = torch.linalg.eigvalsh(self.covariance(which))
        else:
            centred = rows[which] - rows[which].mean(1, keepdim=True)
            values = torch.linalg.eigvalsh(centred @ centred.mT)
        roots = values.clamp(min=0).sqrt()
        return torch.special.entr(roots / roots.sum(-1, keepdim=True)).sum(-1).exp()

    def cka(self) -> Float[Tensor, " states"]:
        """Debiased linear CKA of x and y for each state: 1 for equal states, near 0 for unrelated ones. NaN for fewer than four prompts."""
        if self.count < 4:
            return torch.full((len(self.origin["x"]),), torch.nan, dtype=torch.float64)
        return self._dependence("x", "y") / (self._dependence("x", "x") * self._dependence("y", "y")).sqrt()

    def _dependence(self, one: str, other: str) -> Float[Tensor, " states"]:
        """Song et al.'s unbiased HSIC for linear kernels, times n (n - 3); computed from the sums where there are sums."""
        n, rows = self.count, self._rows()
        if rows is not None:
            kernels = [_without_diagonal(values @ values.mT) for values in (rows[one], rows[other])]
            sides = [kernel.sum(-1) for kernel in kernels]
            trace, products = (kernels[0] * kernels[1]).sum((-2, -1)), (sides[0] * sides[1]).sum(-1)
            totals = [side.sum(-1) for side in sides]
        else:
            sums, both, sizes = self._sums, one + other, self._sums[f"|{one}||{other}|"]
            across = sums[both]
            trace = across.square().sum((-2, -1)) - sizes
            totals = [sums[name].square().sum(-1) - sums[f"|{name}|"] for name in (one, other)]
            products = torch.einsum("si,sij,sj->s", sums[one], across, sums[other])
            # |other|one is the sum of other's squared lengths times one's states.
            products = products - (sums[f"|{other}|{one}"] * sums[one]).sum(-1) - (sums[f"|{one}|{other}"] * sums[other]).sum(-1) + sizes
        return trace + totals[0] * totals[1] / ((n - 1) * (n - 2)) - 2 * products / (n - 2)


def _without_diagonal(kernels: Float[Tensor, "states rows rows"]) -> Float[Tensor, "states rows rows"]:
    return kernels - torch.diag_embed(kernels.diagonal(dim1=-2, dim2=-1))
