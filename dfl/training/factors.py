"""What the model reads of the hosted rows, and how gradients come back to them."""

from torch import Tensor

from dfl.adapters import cores
from dfl.adapters.attach import Adapted
from dfl.adapters.layout import empty_rows


class Factors:
    """Factors x (P, D_lora) of trained rows (P, D), and the gradients that the model writes: the rows themselves, or,
    where a kind trains cores, rows that are made of them.

    An executor keeps views of x over many steps, so that x is the same memory all along: `refresh` before it is read.
    """

    def __init__(self, adapted: Adapted, rows: Tensor, gradients: Tensor):
        self.rows, self.row_gradients = self.x, self.gradients = rows, gradients
        self.cores = None
        if adapted.cores:
            self.x, self.gradients = (empty_rows(len(rows), adapted.lora.size, device=rows.device) for _ in range(2))
            self.cores = adapted.cores._replace(bases=adapted.cores.bases.to(rows.device))

    def refresh(self) -> Tensor:
        """x as the rows make it now."""
        if self.cores:
            cores.expand(self.cores, self.rows, self.x)
        return self.x

    def pull_back(self) -> None:
        """The rows' gradients from those that the model wrote."""
        if self.cores:
            cores.pull_back(self.cores, self.rows, self.gradients, self.row_gradients)

    def zero_gradients(self, active: list[int]) -> None:
        """Of the rows `active`, in place: the gradients are views that autograd accumulates into."""
        for g in (self.gradients, self.row_gradients) if self.cores else (self.gradients,):
            if len(active) == len(g):
                g.zero_()
            else:
                for row in active:
                    g[row].zero_()
